"""Matrix products in float32 by the fastest kernel this machine has."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

_Linear = Callable[[Tensor, Tensor, Tensor | None, str, list[float], str], Tensor]


def _find_onednn() -> _Linear | None:
    # What torch.compile emits for a Linear on the CPU. Plain matmul of float32 goes to MKL, which
    # runs its AVX2 kernels on processors that are not Intel's: 90 GFLOP/s a core where oneDNN's
    # AVX-512 ones reach 200 (Zen 5). On Intel the two are equal.
    try:
        linear = cast(_Linear, torch.ops.mkldnn._linear_pointwise)
        a = torch.arange(6.0).reshape(2, 3)
        works = torch.equal(linear(a, a, None, "none", [], ""), torch.mm(a, a.t()))
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return linear if works else None


_linear = _find_onednn()


def _multiplies_bfloat16() -> bool:
    # Without these instructions oneDNN widens bfloat16 first, which takes twice the time of
    # float32, or has no kernel at all. So it does where it is told to leave instructions out,
    # which torch, when asked, does not know of.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    bound = any(name in os.environ for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    there = any(getattr(torch.cpu, name, bool)() for name in asked)
    return _linear is not None and there and not bound


BFLOAT16 = _multiplies_bfloat16()  # whether this CPU multiplies bfloat16 faster than float32


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a (p, k) with the transpose of b (q, k), in float32: a b^T, (p, q).

    Source   a private operator of torch 2.x (`mkldnn::_linear_pointwise`), taken if it is there
             and gives the right answer when this module is imported; `torch.mm` otherwise.
    """
    if _linear is None or a.device.type != "cpu" or a.shape[1] == 0:
        return torch.mm(a, b.t())
    return _linear(a, b, None, "none", [], "")


def times(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a (p, k) with b (k, q), in float32: a b, (p, q)."""
    return times_transposed(a, b.t())
