"""One module's update: its four factors read, turned into two, and what was lost by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pissa_core.errors import NonFiniteWeight
from pissa_core.layout.header import TensorInfo
from pissa_core.lora.adapter import WEIGHTS, Pair
from pissa_core.lora.compress import compress
from pissa_core.lora.form import Form
from pissa_core.lora.plan import Update
from pissa_core.ports import CheckpointSource
from pissa_core.spec import LoraOptions
from pissa_core.tensorfile import TORCH_DTYPES, empty


@dataclass(frozen=True, slots=True)
class Factors:
    """B (m, r) and A (r, n) of one module."""

    B: Tensor
    A: Tensor


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of one module, and its row in the manifest."""

    factors: Factors
    row: dict[str, Any]


def read_factors(source: CheckpointSource, pair: Pair) -> Factors:
    """Read both factors of a module by positioned reads.

    Raises:
        NonFiniteWeight: if one holds NaN or Inf.
    """
    return Factors(_read(source, pair.b), _read(source, pair.a))


def convert_update(
    update: Update,
    trained: Factors,
    initial: Factors,
    *,
    form: Form,
    width: int,
    options: LoraOptions,
    device: torch.device,
) -> Converted:
    """Turn the factors of one module into those of the result."""
    dtype = TORCH_DTYPES[form.dtype(update)]
    row: dict[str, Any] = {
        "module": update.module,
        "tensor": update.trained.a.name,
        "shard": WEIGHTS,
        "shape": list(update.trained.shape),
    }
    if form.compressed:
        factors, figures = _compressed(update, trained, initial, form, width, options, device)
    else:
        factors = stack(trained, initial)
        figures = {"lost": 0.0}
        if form.folded:
            ratio = update.trained.scaling / form.scaling(update, width)
            factors = Factors(factors.B.double() * ratio, factors.A)
    if options.tolerance is None:
        factors = Factors(pad_columns(factors.B, width), pad_rows(factors.A, width))
    rank = factors.A.shape[0]
    row |= {"rank": rank, "scaling": form.scaling(update, rank), **figures}
    stored = Factors(factors.B.to(dtype).contiguous(), factors.A.to(dtype).contiguous())
    return Converted(stored, row)


def stack(trained: Factors, initial: Factors) -> Factors:
    """Write B A − B₀ A₀ as one product: [B, −B₀] · [A; A₀].

    Shapes   B, B0 (m, r); A, A0 (r, n); out (m, 2r) and (2r, n).
    Dtype    the one that holds both without loss; nothing is rounded.
    Source   PEFT, `LoraModel.subtract_mutated_init`, bit for bit.
    """
    B = torch.cat([trained.B, -initial.B], dim=1)
    A = torch.cat([trained.A, initial.A], dim=0)
    return Factors(B, A)


def pad_columns(B: Tensor, rank: int) -> Tensor:
    """Add columns of zeros to B (m, r) up to a rank; the product with a padded A stays."""
    return torch.nn.functional.pad(B, (0, rank - B.shape[1]))


def pad_rows(A: Tensor, rank: int) -> Tensor:
    """Add rows of zeros to A (r, n) up to a rank."""
    return torch.nn.functional.pad(A, (0, 0, 0, rank - A.shape[0]))


def working_bytes(update: Update, options: LoraOptions) -> int:
    """Return the bytes one module needs while it is in flight.

    Exact: its factors as they came and as they go. Compressed: on top, in float64, both stacked
    factors, their orthonormal bases, LAPACK's copies of them, and a few squares of side 2r.
    """
    m, n = update.trained.shape
    double = 2 * update.trained.rank
    squeezed = options.rank is not None or options.tolerance is not None
    extra = 8 * (5 * double * (m + n) + 8 * double * double) if squeezed else 0
    return 3 * update.nbytes + extra


def _compressed(
    update: Update,
    trained: Factors,
    initial: Factors,
    form: Form,
    width: int,
    options: LoraOptions,
    device: torch.device,
) -> tuple[Factors, dict[str, Any]]:
    found = compress(
        trained.B.to(device),
        trained.A.to(device),
        initial.B.to(device),
        initial.A.to(device),
        scaling=update.trained.scaling,
        rank=update.bound,
        tolerance=options.tolerance,
    )
    # ΔW = left · right = s' · (left / √s') · (right / √s'), with s' the scaling in the result.
    rank = width if options.tolerance is None else len(found.sigma)
    root = form.scaling(update, rank) ** 0.5
    figures = {"lost": found.lost, "sigma": found.sigma.tolist()}
    return Factors((found.left / root).cpu(), (found.right / root).cpu()), figures


def _read(source: CheckpointSource, tensor: TensorInfo) -> Tensor:
    values, buffer = empty(tensor.shape, tensor.dtype)
    source.read_into(tensor.shard, tensor.start, buffer)
    if not torch.isfinite(values).all():
        raise NonFiniteWeight(
            f"{tensor.name} of {source.ref} holds NaN or Inf",
            hint="the training diverged; take an earlier checkpoint",
        )
    return values
