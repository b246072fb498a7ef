"""What is true of every conversion: merged, it is the same; compressed, it loses what it says."""

from __future__ import annotations

import math
import re
from typing import Any

import peft.utils.other
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_tools import config, made_adapter, to_lora, weights

from pissa_core.lora.compress import compress
from pissa_core.lora.patterns import one_module, order_free, value_for

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS32, EPS64 = 2.0**-24, 2.0**-53

sides = st.integers(1, 24)
ranks = st.integers(1, 9)
seeds = st.integers(0, 2**32)


def factors(seed: int, m: int, n: int, rank: int, *, step: float) -> list[torch.Tensor]:
    """B, A, B₀, A₀: initial factors, and what a training of some length makes of them."""
    random = torch.Generator().manual_seed(seed)
    B0, A0 = torch.randn(m, rank, generator=random), torch.randn(rank, n, generator=random)
    B = B0 + step * torch.randn(m, rank, generator=random)
    A = A0 + step * torch.randn(rank, n, generator=random)
    return [B, A, B0, A0]


@settings(max_examples=100, deadline=None)
@given(seeds, sides, sides, ranks, ranks, st.floats(0.01, 10), st.sampled_from([0, 1e-6, 1e-2, 1]))
def test_what_compression_loses_is_the_discarded_singular_values(seed, m, n, r, k, scaling, step):
    B, A, B0, A0 = factors(seed, m, n, r, step=step)
    delta = scaling * (B.double() @ A.double() - B0.double() @ A0.double())
    found = compress(B, A, B0, A0, scaling=scaling, rank=k)
    sigma = torch.linalg.svdvals(delta)
    kept = len(found.sigma)
    # The oracle subtracts large products; what it knows of delta ends at their rounding.
    size = scaling * float((B.abs() @ A.abs() + B0.abs() @ A0.abs()).double().norm())
    slack = 64 * EPS64 * size * (m + n + r)
    assert kept == min(k, 2 * r, m, n)
    assert torch.allclose(found.sigma, sigma[:kept], rtol=1e-9, atol=slack)
    error = (delta - found.left @ found.right).norm()
    best = float(sigma[kept:].norm())
    assert abs(float(error) - best) <= slack + 1e-9 * best
    total = float(sigma.norm())
    if total > 1e3 * slack:
        assert math.isclose(found.lost, best**2 / total**2, rel_tol=1e-5, abs_tol=1e-12)


@settings(max_examples=80, deadline=None)
@given(seeds, sides, sides, ranks, st.floats(1e-6, 0.9))
def test_a_tolerance_is_kept_with_the_smallest_rank(seed, m, n, r, tolerance):
    B, A, B0, A0 = factors(seed, m, n, r, step=0.3)
    found = compress(B, A, B0, A0, scaling=1.0, rank=2 * r, tolerance=tolerance)
    sigma = torch.linalg.svdvals(B.double() @ A.double() - B0.double() @ A0.double())
    tail = [float(sigma[k:].square().sum() / sigma.square().sum()) for k in range(len(sigma) + 1)]
    kept = len(found.sigma)
    assert found.lost <= tolerance
    assert tail[kept] <= tolerance + 1e-9
    assert kept == 1 or tail[kept - 1] > tolerance - 1e-9


def test_a_training_that_changed_nothing_has_an_update_of_zero():
    B, A, *_ = factors(0, 6, 5, 3, step=1.0)
    found = compress(B, A, B, A, scaling=2.0, rank=4, tolerance=0.1)
    assert found.lost == 0.0
    assert not (found.left @ found.right).any()


def test_a_short_training_keeps_its_own_precision():
    """The update is 1e-6 of the factors, and still known to nine digits."""
    B, A, B0, A0 = (t.double() for t in factors(1, 40, 30, 4, step=1e-6))
    exact = (B - B0) @ A + B0 @ (A - A0)
    found = compress(*(t.float() for t in (B, A, B0, A0)), scaling=1.0, rank=8)
    rounded = [t.float().double() for t in (B, A, B0, A0)]
    meant = (rounded[0] - rounded[2]) @ rounded[1] + rounded[2] @ (rounded[1] - rounded[3])
    assert (found.left @ found.right - meant).norm() < 1e-9 * exact.norm()


def merged(adapter: Any, module: str) -> torch.Tensor:
    """Return scaling · B @ A of one module, scaling read as PEFT reads it."""
    said, tensors = config(adapter), weights(adapter)
    key = f"base_model.model.{module}.lora_"
    B, A = tensors[f"{key}B.weight"].double(), tensors[f"{key}A.weight"].double()
    get = peft.utils.other.get_pattern_key
    ranks, alphas = said["rank_pattern"], said["alpha_pattern"]
    rank = ranks.get(get(ranks.keys(), module), said["r"])
    alpha = alphas.get(get(alphas.keys(), module), said["lora_alpha"])
    assert A.shape[0] == B.shape[1] == rank
    return alpha / (math.sqrt(rank) if said["use_rslora"] else rank) * (B @ A)


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=3),
    rank=ranks,
    alpha=st.one_of(st.integers(1, 64), st.floats(0.1, 64)),
    rslora=st.booleans(),
    pattern=st.booleans(),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    options=st.fixed_dictionaries(
        {"rank": st.none() | ranks, "tolerance": st.none() | st.floats(1e-6, 0.5),
         "uniform": st.booleans()}
    ),
)  # fmt: skip
def test_converted_then_merged_is_merged(
    tmp_path_factory, seed, shapes, rank, alpha, rslora, pattern, dtypes, options
):
    here = tmp_path_factory.mktemp("one", numbered=True)
    # The second and third names end like the first: patterns must tell them apart.
    named = dict(zip(("q", "x.q", "x.x.q"), shapes, strict=False))
    fields: dict[str, Any] = {"lora_alpha": alpha, "use_rslora": rslora}
    if pattern:
        fields |= {"rank_pattern": {"q": rank + 2}, "alpha_pattern": {"q": 3.5}}
    trained = made_adapter(here / "trained", named, seed=seed, rank=rank, dtype=dtypes[0], **fields)
    initial = made_adapter(
        here / "initial", named, seed=seed + 1, rank=rank, dtype=dtypes[1], **fields
    )
    manifest = to_lora(trained, here / "lora", initial, slots=1, **options)
    for row in manifest["matrices"]:
        module = row["module"]
        wanted = merged(trained, module) - merged(initial, module)
        got = merged(here / "lora", module)
        # Factors new to float32 have a rounding each; the product sums 2r of such.
        big = merged_size(trained, module) + merged_size(initial, module)
        slack = 8 * EPS32 * big
        lost = row["lost"] ** 0.5 * float(wanted.norm())
        assert float((got - wanted).norm()) <= slack + lost * (1 + 1e-6)
        if options["tolerance"] is not None and options["rank"] is None:
            assert row["lost"] <= options["tolerance"]


def merged_size(adapter: Any, module: str) -> float:
    return float(merged(adapter, module).norm()) + 1e-30


@given(
    st.dictionaries(
        st.sampled_from(["q", "x.q", r"layers\.\d.q", "^layers.1.q", "v", ".*", "q|v"]),
        st.integers(1, 99),
    ),
    st.sampled_from(["q", "x.q", "layers.1.q", "layers.12.q", "a.layers.1.q", "v", "qv"]),
)
def test_patterns_mean_what_peft_means(patterns, module):
    key = peft.utils.other.get_pattern_key(patterns.keys(), module)
    assert value_for(module, patterns, 0) == patterns.get(key, 0)


def test_patterns_that_sorting_would_change_are_made_explicit():
    modules = ["a.q", "b.q"]
    patterns = {"b.q": 1, "a.*|b.q": 2}
    assert order_free(patterns, 3, modules) == {"^a\\.q": 2, "^b\\.q": 1}
    assert re.match(rf"(.*\.)?({one_module('a.q')})$", "x.a.q") is None
    assert order_free({"q": 1, "a": 2}, 3, modules) == {"a": 2, "q": 1}
