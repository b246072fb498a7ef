"""The bytes do not depend on how many matrices are in flight, nor on their order."""

from __future__ import annotations

import pytest
import torch
from spectra import SPECTRA

from pissa_core.slots import run_in_slots
from pissa_core.spec import SvdConfig
from pissa_core.split import matrix_seed, split_principal

NAMES = [f"layer.{i}.weight" for i in range(8)]
SHAPES = [(500, 420), (420, 500), (600, 200), (64, 64)]


def matrices() -> dict[str, torch.Tensor]:
    kinds = ["heavy tail over a bulk", "flat bulk", "one outlier", "fast decay"]
    return {
        name: SPECTRA[kinds[i % 4]](*SHAPES[i % 4], 4).to(
            torch.bfloat16 if i % 2 else torch.float32
        )
        for i, name in enumerate(NAMES)
    }


@pytest.mark.parametrize("method", ["auto", "lowrank", "exact"])
def test_bytes_do_not_depend_on_slots_or_order(method: str) -> None:
    given = matrices()

    def work(name: str) -> tuple[str, list[torch.Tensor], object]:
        done = split_principal(
            given[name],
            4,
            scaling=0.5,
            svd=SvdConfig(method=method),  # type: ignore[arg-type]
            seed=matrix_seed(0, name),
            rounding="faithful",
            adapter_dtype=torch.float32,
        )
        torch.randn(7)  # a neighbour that uses the global generator disturbs nobody
        return name, [done.A, done.B, done.R], done.certificate

    def run(names: list[str], slots: int) -> dict[str, tuple[list[torch.Tensor], object]]:
        items = [(name, 1) for name in names]
        return {n: (t, c) for n, t, c in run_in_slots(work, items, slots=slots, budget=100)}

    first = run(NAMES, 1)
    for names, slots in ((NAMES[::-1], 1), (NAMES, 2), (NAMES[3:] + NAMES[:3], 4)):
        again = run(names, slots)
        for name in NAMES:
            assert all(map(torch.equal, first[name][0], again[name][0]))
            assert first[name][1] == again[name][1]
