"""`python -m app.cli` is the command `pissa`."""

from app.cli import main

main()
