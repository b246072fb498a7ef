"""Whatever the matrix: put together again it is the original, entry by entry within the bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa_core.errors import UnsupportedAdapter, UnsupportedDtype
from pissa_core.fold.arithmetic import compare, fold_in
from pissa_core.spec import SvdConfig
from pissa_core.split import split_principal
from pissa_core.verify.matrix import UNIT, Recombination

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@st.composite
def matrices(draw: st.DrawFn) -> dict:
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from([1e-3, 0.02, 1.0, 30.0]))
    W = torch.randn(m, n, generator=generator) * size
    if draw(st.booleans()):  # a dominant direction, so that R is small against W
        W += 20 * size * torch.outer(torch.ones(m), torch.randn(n, generator=generator))
    return {
        "W": W.to(draw(st.sampled_from(DTYPES))),
        "rank": draw(st.integers(1, min(m, n))),
        "scaling": draw(st.sampled_from([1.0, 0.5, 2.0, 0.7071, 16.0])),
        "turned": draw(st.booleans()),
        "rounding": draw(st.sampled_from(["faithful", "peft"])),
        "adapter_dtype": draw(st.sampled_from(DTYPES)),
    }


def pair_of(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split; return W and R as stored, B and A as stored."""
    stored = case["W"]
    split = split_principal(
        stored.t() if case["turned"] else stored,
        case["rank"],
        scaling=case["scaling"],
        svd=SvdConfig(method="exact"),
        seed=0,
        rounding=case["rounding"],
        adapter_dtype=case["adapter_dtype"],
    )
    R = split.R.t() if case["turned"] else split.R
    return stored, R.contiguous(), split.B, split.A


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices())
def test_put_together_again_it_is_the_original_within_the_bound(case):
    """Faithful: u |R| for the residual's rounding, u |W| for the sum's, and float32's own."""
    case["rounding"] = "faithful"
    W, R, B, A = pair_of(case)
    back = R.clone()
    fold_in(back.t() if case["turned"] else back, B, A, scaling=case["scaling"])
    sizes = (B.float().abs() @ A.float().abs()) * case["scaling"]
    sizes = sizes.t() if case["turned"] else sizes
    u = UNIT[W.dtype]
    wanted, rest = W.float().abs(), R.float().abs()
    arithmetic = 2.0**-23 * (case["rank"] + 4) * (sizes + wanted + rest)
    bound = u * (1 + 2 * u) * rest + u * (wanted + 2 * u * rest) + arithmetic + TINY[W.dtype]
    assert bool(((back.float() - W.float()).abs() <= bound).all())
    likeness = compare(back, W)
    assert likeness.equal == int((back == W).sum() - ((back == 0) & _other_zero(back, W)).sum())
    assert (likeness.max_ulps == 0) == bool((back == W).all())


def _other_zero(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.signbit(one) != torch.signbit(other)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices())
def test_what_was_split_keeps_the_bound_of_verify(case):
    W, R, B, A = pair_of(case)
    left, right = B.float(), A.float().t().contiguous()
    if case["turned"]:
        left, right = right, left
    rounded = UNIT[W.dtype] if case["rounding"] == "peft" and W.dtype != torch.float32 else 0.0
    found = Recombination(left, right, case["scaling"], W.dtype, rounded)
    step = max(1, len(W) // 3)
    for start in range(0, len(W), step):
        found.add(start, W[start : start + step], R[start : start + step])
    assert found.worst <= 1, found.place
    norm = float(torch.linalg.vector_norm(W.double()))
    assert found.norm == pytest.approx(norm, rel=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(matrices(), st.integers(0, 10**6))
def test_one_wrong_weight_breaks_the_bound(case, place):
    case["rounding"] = "faithful"
    W, R, B, A = pair_of(case)
    left, right = B.float(), A.float().t().contiguous()
    if case["turned"]:
        left, right = right, left
    row, column = divmod(place % W.numel(), W.shape[1])
    spoiled = R.clone()
    change = 0.1 * float(W.abs().max()) + 1e-4
    spoiled[row, column] += change
    found = Recombination(left, right, case["scaling"], W.dtype, 0.0)
    found.add(0, W, spoiled)
    assert found.worst > 1
    assert found.place == (row, column)


def test_ulps_count_representable_numbers():
    for dtype in DTYPES:
        one = torch.tensor([[1.0, 0.0, -1.0, -0.0]], dtype=dtype)
        eps = torch.finfo(dtype).eps
        other = torch.tensor([[1.0 + eps, -0.0, -1.0 - 2 * eps, 0.0]], dtype=dtype)
        found = compare(one, other)
        assert found.max_ulps == 2
        assert found.equal == 0
        assert compare(one, one).equal == 4
        smallest = torch.tensor([[torch.finfo(dtype).smallest_normal]], dtype=dtype)
        assert compare(smallest, -smallest).max_ulps == 2 * int(
            smallest.view(torch.int32 if dtype is torch.float32 else torch.int16)
        )


def test_what_is_not_finite_is_said():
    R, B, A = torch.ones(3, 2), torch.ones(3, 1), torch.ones(1, 2)
    with pytest.raises(UnsupportedAdapter, match="factors are not finite"):
        fold_in(R.clone(), B * float("nan"), A, scaling=1.0)
    with pytest.raises(UnsupportedDtype, match=r"leave the range of torch\.float16"):
        fold_in(R.half(), 300 * B, 300 * A, scaling=1.0)
