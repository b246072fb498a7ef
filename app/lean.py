"""torch, transformers and PEFT without what a command has no use for.

Of torch: its kernels in Python for the meta device. Of the others, in a process of one plan:
torch's compiler, DTensor, scipy, trio. Together those are half of all modules and of the seconds.
Such a process has functions that torch's compiler should have wrapped and that stay plain, and
transformers as with a torch that was built without distribution. A plan runs no forward pass.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

ONE_THREAD = ("OPENBLAS_NUM_THREADS", "1")
"""Has OpenBLAS, which NumPy brings along, start no threads: they wait in a busy loop.

Nobody asks NumPy for a product, and where torch itself is linked with OpenBLAS, a matrix in flight
has one thread all the same.
"""

_KERNELS = "torch._meta_registrations"
_GENERATORS = "torch._prims.rng_prims"
_COMPILER = "torch._dynamo"
_MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op"
_LIBRARIES = ("transformers", "peft", "accelerate")
_OURS = "pissa_core.targets."
_DECORATORS = ("disable", "assume_constant_result", "allow_in_graph", "disallow_in_graph")


def import_torch() -> None:
    """Import torch without its kernels in Python for the meta device, a third of its seconds.

    Without them some operations on meta tensors raise `NotImplementedError`: 31 of 890 classes of
    transformers use one as they are built, and Llama does with the positions of its third
    generation. `torch.Generator` needs them, too, and torch's compiler takes them for imported:
    the one is made good by `quick_imports`, the other gets them when it is imported itself.
    """
    if "torch" in sys.modules:
        return
    _StandIn.take_place(_KERNELS, {})
    import torch

    if isinstance(sys.modules.get(_KERNELS), _StandIn):
        del sys.modules[_KERNELS]
        vars(torch).pop(_KERNELS.rpartition(".")[2], None)
        sys.meta_path.insert(0, _KernelsFirst())


def import_kernels() -> None:
    """Import what `import_torch` left out."""
    importlib.import_module(_KERNELS)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch as work on a CPU needs it, and what the block imports, without the collector.

    That would go through a million new objects again and again.
    """
    gc.disable()
    os.environ.setdefault(*ONE_THREAD)
    try:
        import_torch()
        _import_generators()
        yield
    finally:
        gc.freeze()
        gc.enable()


def _import_generators() -> None:
    import torch

    if torch.version.cuda or torch.version.hip:  # what a GPU needs of them was never measured
        import_kernels()
        return
    try:
        importlib.import_module(_GENERATORS)
        torch.Generator()
    except Exception:  # noqa: BLE001 - whatever a release to come asks for
        import_kernels()


@functools.cache
def import_for_a_plan() -> None:
    """Import what a plan needs; all of it where less does not do."""
    # Models' modules ask the compiler to leave functions alone, as they are imported, and torch
    # itself does for sums on the meta device.
    _StandIn.take_place(_COMPILER, dict.fromkeys(_DECORATORS, _undecorated))
    _StandIn.take_place(_MASKS, {"TransformGetItemToIndex": nullcontext})
    try:
        with _unseen("trio"), _unseen_scipy(), _not_distributed(), _roomy_caches():
            import pissa_core.targets.injection  # noqa: F401 - imports both libraries
    except Exception:  # noqa: BLE001 - whatever a release to come asks for
        import_everything()


@functools.cache  # what was imported before stays in memory
def import_everything() -> None:
    """Import all of the libraries, and what builds on them, whatever has been imported of them."""
    import_kernels()
    for name, module in list(sys.modules.items()):
        theirs = name.partition(".")[0] in _LIBRARIES or name.startswith(_OURS)
        if theirs or isinstance(module, _StandIn):
            del sys.modules[name]
    importlib.import_module(f"{_OURS}injection")


@contextmanager
def _unseen_scipy() -> Iterator[None]:
    """Do without half a second and 40 MB, which are for losses alone."""
    with _unseen("scipy"):
        yield
    from transformers.utils import is_scipy_available

    is_scipy_available.cache_clear()  # some classes refuse to be built without it


@contextmanager
def _unseen(name: str) -> Iterator[None]:
    """Have a module look as if it were not installed, where it has not been imported."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(name, None)


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


@contextmanager
def _roomy_caches() -> Iterator[None]:
    """Have caches hold all there is.

    transformers lists its 550 folders of models, by reading every file, with a cache of 128, and
    then does so again.
    """
    bounded = functools.lru_cache

    def roomy(maxsize: Any = 128, typed: bool = False) -> Any:
        if callable(maxsize):
            return bounded(None)(maxsize)
        return bounded(maxsize and None, typed)  # 0 is for none at all

    functools.lru_cache = roomy
    try:
        yield
    finally:
        functools.lru_cache = bounded


class _KernelsFirst(MetaPathFinder):
    """Has torch's compiler find the kernels imported, on which it relies.

    It stays where it is: other threads may be going through the list of finders.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """Find nothing itself."""
        if name == _COMPILER and _KERNELS not in sys.modules:
            import_kernels()


class _StandIn(ModuleType):
    """A module of which little is there, until something else is asked of it.

    Then it is imported, and is whole; but a module below it that is the first to be asked for, by
    its own name, is loaded twice.
    """

    _little: Mapping[str, object]

    @classmethod
    def take_place(cls, name: str, little: Mapping[str, object]) -> None:
        """Stand in for a module, unless it is there."""
        if name not in sys.modules:
            sys.modules[name] = stand_in = cls(name)
            stand_in._little = little

    def __getattr__(self, name: str) -> Any:
        # What is below a package is found by its path, which the package itself knows.
        if name.startswith("__") and (name, self.__name__) != ("__path__", _COMPILER):
            raise AttributeError(name)
        return self._little[name] if name in self._little else getattr(self._step_aside(), name)

    def _step_aside(self) -> ModuleType:
        for name, module in list(sys.modules.items()):
            if isinstance(module, _StandIn) and f"{name}.".startswith(f"{self.__name__}."):
                del sys.modules[name]
        return importlib.import_module(self.__name__)


def _undecorated(function: Any = None, *_: object, **__: object) -> Any:
    return (lambda later: later) if function is None else function
