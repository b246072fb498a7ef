"""``python -m worker [--device D] [--slots N]``: one worker for `PISSA_REDIS_URL`."""

from __future__ import annotations

import click

from pissa_core.errors import PissaError
from worker.main import run_worker
from worker.settings import Settings


@click.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N")
@click.option("--slots", type=click.IntRange(min=1), help="matrices in flight at once")
def main(*, device: str, slots: int | None) -> None:
    """Work for the service whose store is at PISSA_REDIS_URL."""
    try:
        run_worker(Settings.from_env(), device=device, slots=slots)
    except PissaError as error:
        raise click.ClickException(f"[{error.code}] {error.message}") from error


if __name__ == "__main__":
    main()
