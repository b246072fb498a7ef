"""Find modules whose weight is used without the module being called, which no adapter survives.

A few classes (Mamba's fused kernels, WavLM's attention, torch's own MultiheadAttention) multiply
by ``self.out_proj.weight`` themselves. PEFT's layer then never runs: harmless for a LoRA that
starts at zero, but a residual without its adapter is a broken model.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Hashable, Iterator
from types import FunctionType
from typing import cast

from torch import nn

from pissa_core.targets.checkpoint_tree import Bare

_METADATA = r"dtype|device|shape|size|ndim|dim|numel|is_meta|requires_grad|_is_\w+"
_FUSED_IN_KERNELS = ("x_proj", "dt_proj", "out_proj")
"""What the fused kernels of state-space layers take as bare weights."""


def uses_bare_weight(parent: nn.Module, child: str) -> bool:
    """Whether `parent` reads ``self.<child>.weight`` for more than its dtype, device or shape."""
    if isinstance(parent, nn.MultiheadAttention):
        return True
    if isinstance(parent, Bare):
        # Of custom code only the parameters are known; these two tell the same kinds of module.
        attention = parent.holds("in_proj_weight") and child == "out_proj"
        return attention or (parent.holds("A_log") and child in _FUSED_IN_KERNELS)
    if getattr(parent, "slow_but_exact", None) is False:
        return False  # Bloom reads bare weights only if its config asks for that.
    use = re.compile(
        rf"(?<!isinstance\()(?<!hasattr\()\bself\.{re.escape(child)}\.weight\b"
        rf"(?!\.(?:{_METADATA})\b)(?!\s*=[^=])"
    )
    kind = cast(Hashable, type(parent))
    return any(use.search(source) for source in _sources(kind))


@functools.cache
def _sources(kind: Hashable) -> tuple[str, ...]:
    """Return the source of every method of a class that mentions a weight at all."""
    return tuple(_read_sources(kind)) if isinstance(kind, type) else ()


def _read_sources(kind: type) -> Iterator[str]:
    for ancestor in kind.__mro__:
        if ancestor.__module__.startswith("torch."):
            continue
        for name, member in vars(ancestor).items():
            method = inspect.unwrap(member) if callable(member) else member
            # The names in the compiled code tell cheaply which few sources are worth reading.
            if (
                isinstance(method, FunctionType)
                and name != "__init__"
                and "weight" in method.__code__.co_names
            ):
                yield inspect.getsource(method)
