"""verify: is a published pair what it claims to be, and does it give the original back?

`case` is what will be looked at, as data; `asking` makes it from headers, with PEFT's help;
`claims` holds the manifest against what is known; `matrix` is the bound an entry must keep;
`examine` streams original and converted side by side; `report` is the verdict. A fault that is
found is part of the report, not an error.
"""
