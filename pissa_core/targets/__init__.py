"""Which modules become adapters, decided by PEFT itself on a model without weights.

The model's class is built on the meta device (`skeleton`), PEFT injects its LoRA layers there
(`injection`), and each is tied to the one tensor of the checkpoint that holds its weight
(`naming`). What cannot be converted correctly is refused by name (`refusals`), all at once.
"""

from pissa_core.targets.resolve import Targets, resolve_targets

__all__ = ["Targets", "resolve_targets"]
