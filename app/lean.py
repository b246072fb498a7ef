"""transformers and PEFT without what a plan has no use for: torch's compiler, DTensor, scipy.

Those are a third of all modules and of the seconds. Only a process of one plan may do so: of what
it has imported, functions that torch's compiler should have wrapped stay plain, and transformers
is as with a torch that was built without distribution. A plan runs no forward pass.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op"
_DECORATORS = ("disable", "assume_constant_result", "allow_in_graph", "disallow_in_graph")


def import_for_a_plan() -> None:
    """Import what a plan needs; all of it where less does not do."""
    if _COMPILER not in sys.modules:
        _Compiler(_COMPILER).stand_in()
    with suppress(Exception), _unseen_scipy(), _not_distributed():
        import pissa_core.targets.injection
    import pissa_core.targets.injection  # noqa: F401 - imports both libraries


@contextmanager
def _unseen_scipy() -> Iterator[None]:
    """Have scipy look as if it were not installed: half a second and 40 MB, for losses alone."""
    seen = "scipy" in sys.modules
    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if not seen:
            del sys.modules["scipy"]
        from transformers.utils import is_scipy_available

        is_scipy_available.cache_clear()  # some classes refuse to be built without it


@contextmanager
def _not_distributed() -> Iterator[None]:
    """Have torch say that it was built without distribution."""
    import torch.distributed

    said = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = said


class _Compiler(ModuleType):
    """torch's compiler until something else is asked of it than to leave a function alone.

    Models' modules ask it that as they are imported, and torch itself for sums on the meta device.
    """

    def stand_in(self) -> None:
        """Take the compiler's place."""
        masks = ModuleType(_MASKS)
        masks.TransformGetItemToIndex = nullcontext  # type: ignore[attr-defined]
        sys.modules[_COMPILER], sys.modules[_MASKS] = self, masks

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # which is asked for what is below it
            raise AttributeError(name)
        if name in _DECORATORS:
            return _undecorated
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER], sys.modules[_MASKS]
        return getattr(importlib.import_module(_COMPILER), name)


def _undecorated(function: Any = None, *_: object, **__: object) -> Any:
    return (lambda later: later) if function is None else function
