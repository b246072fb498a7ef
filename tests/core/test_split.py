"""The split gives W back, is unique where it can be, and is PEFT's where it is asked to be."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from spectra import SPECTRA, bulk
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa_core.errors import NonFiniteWeight, RankTooLarge, UnsupportedDtype
from pissa_core.spec import SvdConfig
from pissa_core.split import Split, matrix_seed, split_principal

pytestmark = pytest.mark.usefixtures("one_thread")

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def split(W: Tensor, rank: int, **wishes: object) -> Split:
    given = {
        "scaling": 1.0,
        "svd": SvdConfig(),
        "seed": 5,
        "rounding": "faithful",
        "adapter_dtype": torch.float32,
    }
    return split_principal(W, rank, **(given | wishes))  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ["faithful", "peft"])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", list(UNIT))
def test_a_residual_in_the_matrix_s_own_memory_has_the_same_bits(
    dtype: torch.dtype, by_rows: bool, rounding: str
) -> None:
    W = bulk(700, 900).to(dtype) if by_rows else bulk(900, 700).to(dtype).t()
    kept = W.clone()
    apart = split(W, 12, rounding=rounding)
    assert torch.equal(W, kept)
    assert apart.R.data_ptr() != W.data_ptr()
    within = split(W, 12, rounding=rounding, overwrite=True)
    assert (within.R.data_ptr() == W.data_ptr()) == (rounding == "faithful")
    assert within.R.stride() == W.stride()
    for name in ("A", "B", "R"):
        assert torch.equal(getattr(within, name), getattr(apart, name))
    assert within.certificate == apart.certificate


class _Model(nn.Module):
    """One linear layer, as PEFT wraps it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.config = {"model_type": "none"}
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def peft_split(layer: nn.Module, rank: int, alpha: float, rslora: bool) -> tuple[Tensor, ...]:
    """Return A, B and the residual as stored by PEFT, and its scaling."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        use_rslora=rslora,
        init_lora_weights="pissa",
        target_modules=["layer"],
        fan_in_fan_out=isinstance(layer, Conv1D),
    )
    wrapped = get_peft_model(_Model(layer), config).base_model.model.layer  # type: ignore[arg-type]
    return (
        wrapped.lora_A["default"].weight.data,
        wrapped.lora_B["default"].weight.data,
        wrapped.base_layer.weight.data,
        wrapped.scaling["default"],
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("out_in", [(48, 80), (80, 48), (64, 64)])
def test_exact_in_the_manner_of_peft_is_peft_bit_for_bit(
    out_in: tuple[int, int], kind: str, dtype: torch.dtype, rslora: bool
) -> None:
    m, n = out_in
    stored = bulk(m, n).to(dtype) if kind == "Linear" else bulk(n, m).to(dtype)
    layer = nn.Linear(n, m, bias=False) if kind == "Linear" else Conv1D(m, n)
    layer.weight.data = stored.clone()
    A, B, residual, scaling = peft_split(layer.to(dtype), 8, 12, rslora)
    W = stored if kind == "Linear" else stored.t()
    for given in (W, W.contiguous()):
        ours = split(given, 8, scaling=scaling, svd=SvdConfig(method="exact"), rounding="peft")
        R = ours.R if kind == "Linear" else ours.R.t()
        assert torch.equal(ours.A, A)
        assert torch.equal(ours.B, B)
        assert torch.equal(R, residual)


@pytest.mark.parametrize("rounding", ["faithful", "peft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spectrum", ["heavy tail over a bulk", "fast decay", "flat bulk"])
@pytest.mark.parametrize("method", ["auto", "exact", "lowrank"])
def test_what_is_stored_recombines_as_certified(
    method: str, spectrum: str, dtype: torch.dtype, rounding: str
) -> None:
    W = SPECTRA[spectrum](300, 260, 8).to(dtype)
    done = split(W, 8, scaling=2.0, svd=SvdConfig(method=method), rounding=rounding)  # type: ignore[arg-type]
    assert done.R.dtype == dtype
    assert done.A.dtype == done.B.dtype == torch.float32
    rest = W.double() - done.R.double() - 2.0 * done.B.double() @ done.A.double()
    measured = float(rest.norm() / W.double().norm())
    # The certificate's figure is formed in float32: r products of entries at most |B| |A|.
    slack = 20 * 2.0**-24
    assert done.certificate.recombination_error == pytest.approx(measured, rel=1e-3, abs=slack)
    if rounding == "faithful":
        allowed = UNIT[dtype] * done.R.double().abs() + 2.0**-25 * (dtype == torch.float16)
        allowed += (
            20 * 2.0**-24 * (W.double().abs() + 2 * done.B.double().abs() @ done.A.double().abs())
        )
        assert (rest.abs() <= allowed).all()


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float16])
def test_a_narrow_adapter_still_recombines_since_the_residual_knows(adapter: torch.dtype) -> None:
    W = SPECTRA["heavy tail over a bulk"](300, 260, 8).float()
    done = split(W, 8, adapter_dtype=adapter)
    assert done.A.dtype == done.B.dtype == adapter
    assert done.certificate.recombination_error < 1e-6


def test_the_largest_entry_of_each_column_of_b_is_positive_and_ties_go_to_the_lowest_row() -> None:
    B = split(bulk(60, 50).float(), 9).B
    assert (B.gather(0, B.abs().argmax(dim=0, keepdim=True)) > 0).all()
    # One column of +-1: each entry of its singular vector ties with all others.
    for first in (1.0, -1.0):
        column = first * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        assert float(split(column, 1, svd=SvdConfig(method="exact")).B[0]) > 0


def test_signs_do_not_depend_on_the_method() -> None:
    W = SPECTRA["harmonic"](300, 260, 8).float()
    exact = split(W, 8, svd=SvdConfig(method="exact"))
    auto = split(W, 8, svd=SvdConfig(tolerance=1e-5))
    torch.testing.assert_close(auto.B, exact.B, atol=2e-3, rtol=0)
    torch.testing.assert_close(auto.A, exact.A, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", ["auto", "lowrank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_transposed_view_gives_the_same_numbers_and_its_own_layout(
    method: str, dtype: torch.dtype
) -> None:
    stored = SPECTRA["heavy tail over a bulk"](260, 300, 8).to(dtype)
    view = stored.t()
    one = split(view, 8, svd=SvdConfig(method=method))  # type: ignore[arg-type]
    other = split(view.contiguous(), 8, svd=SvdConfig(method=method))  # type: ignore[arg-type]
    assert one.R.stride() == view.stride()
    assert other.R.is_contiguous()
    torch.testing.assert_close(one.A, other.A, atol=1e-4, rtol=0)
    torch.testing.assert_close(one.B, other.B, atol=1e-4, rtol=0)


@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_a_power_of_two_splits_between_the_factors(exponent: int) -> None:
    W = SPECTRA["heavy tail over a bulk"](300, 260, 4).float()
    plain, scaled = split(W, 4), split(W * 2.0**exponent, 4)
    torch.testing.assert_close(scaled.B * 2.0 ** (-exponent / 2), plain.B, atol=1e-3, rtol=1e-3)
    assert scaled.certificate.recombination_error < 1e-6
    assert scaled.certificate.energy == pytest.approx(plain.certificate.energy, rel=1e-4)


def test_subnormal_float16_weights() -> None:
    W = (SPECTRA["heavy tail over a bulk"](300, 260, 4) * 2e-7).half()
    assert 0 < float(W.abs().max()) < 6e-5
    done = split(W, 4)
    rest = W.double() - done.R.double() - done.B.double() @ done.A.double()
    assert float(rest.abs().max()) <= 2.0**-25 * (1 + 1e-3)
    assert done.certificate.missed <= 1e-4


@pytest.mark.parametrize("rounding", ["faithful", "peft"])
def test_the_zero_matrix(rounding: str) -> None:
    done = split(torch.zeros(30, 20, dtype=torch.bfloat16), 3, rounding=rounding)
    assert not done.A.any()
    assert not done.B.any()
    assert not done.R.any()
    assert all(math.isfinite(v) for v in done.certificate.as_row().values() if isinstance(v, float))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["auto", "exact", "lowrank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_bad_entry_is_named(bad: float, method: str, dtype: torch.dtype) -> None:
    W = torch.ones(40, 30, dtype=dtype)
    W[17, 3] = W[18, 0] = bad
    with pytest.raises(NonFiniteWeight, match=rf"2 of 1200 .* first is {bad} at \[17, 3\]"):
        split(W, 2, svd=SvdConfig(method=method))  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, -1, 21, 1000])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(RankTooLarge, match=f"rank {rank} .* 30 x 20 .* 20 singular values"):
        split(torch.ones(30, 20), rank)


def test_factors_beyond_the_adapter_dtype_are_refused_rather_than_stored_as_infinity() -> None:
    W = SPECTRA["heavy tail over a bulk"](30, 26, 4).float() * 1e12
    with pytest.raises(UnsupportedDtype, match=r"range of torch\.float16"):
        split(W, 2, adapter_dtype=torch.float16)
    assert split(W, 2, adapter_dtype=torch.bfloat16).certificate.recombination_error < 1e-6
    with pytest.raises(UnsupportedDtype, match="range"):
        split(torch.full((400, 300), 3e38), 2)


def test_the_caller_keeps_w() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for method in ("auto", "exact", "lowrank"):
            for rounding in ("faithful", "peft"):
                W = (bulk(80, 60) * 2.0**-40).to(dtype)
                before = W.clone()
                split(W, 4, svd=SvdConfig(method=method), rounding=rounding)  # type: ignore[arg-type]
                assert torch.equal(W, before)


def test_each_matrix_has_a_seed_of_its_own_that_only_names_decide() -> None:
    assert matrix_seed(0, "a.weight") == matrix_seed(0, "a.weight")
    seeds = {matrix_seed(seed, name) for seed in (0, 1, 10) for name in ("a", "b", "0a")}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(matrix_seed(2**63 - 1, "x"))
