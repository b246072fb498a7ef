"""The bytes a plan promises for a matrix in flight are an upper bound of what it allocates."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pissa_core.footprint import working_bytes
from pissa_core.spec import SvdConfig
from pissa_core.split import split_principal

pytestmark = pytest.mark.usefixtures("one_thread")


def peak_allocated(W: torch.Tensor, rank: int, method: str, rounding: str) -> int:
    """Return the most bytes that torch's allocator held for a split, W included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        split_principal(
            W,
            rank,
            scaling=1.0,
            svd=SvdConfig(method=method, niter=1),  # type: ignore[arg-type]
            seed=0,
            rounding=rounding,
            adapter_dtype=torch.float32,
            overwrite=True,
        )
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak + W.nbytes


@pytest.mark.parametrize("rounding", ["faithful", "peft"])
@pytest.mark.parametrize("method", ["auto", "lowrank", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [(1400, 1200, 4), (500, 2400, 24), (2400, 500, 120), (900, 900, 64), (760, 2000, 48)],
)
def test_what_is_promised_is_enough(
    m: int, n: int, rank: int, dtype: torch.dtype, method: str, rounding: str
) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    promised = working_bytes(m, n, rank, dtype.itemsize, method, rounding)
    assert peak_allocated(W, rank, method, rounding) <= promised


def test_the_promise_is_not_idle_for_matrices_of_real_size() -> None:
    # The bound for a Krylov run on a large matrix is near what its parts add up to: W, and a few
    # dozen vectors of the shorter side.
    m, n = 28672, 8192
    assert working_bytes(m, n, 16, 2, "auto") < 2 * m * n + 0.5 * (4 * m * n)
    assert working_bytes(m, n, 16, 2, "exact") > 4 * working_bytes(m, n, 16, 2, "auto")


def test_more_needs_more() -> None:
    for method in ("auto", "lowrank", "exact"):
        one = working_bytes(2048, 2048, 16, 2, method)
        assert working_bytes(4096, 2048, 16, 2, method) > one
        assert working_bytes(2048, 2048, 128, 2, method) > one
        if method != "lowrank":  # widens what is stored in 16 bits, beside the original
            assert working_bytes(2048, 2048, 16, 4, method) >= one
        assert working_bytes(2048, 2048, 16, 2, method, "peft") >= one
