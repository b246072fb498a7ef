"""A GPU that is none: what can be shown of the GPU's path where there is no GPU.

Its tensors say that they are on cuda:0, and the CPU computes what is in them. Like a GPU, and less
forgiving than one, it
* refuses an operation on tensors of two devices, and of a stream that has not been waited for,
* leaves what is copied without waiting as garbage until its stream is waited for, and refuses such
  copies to or from pageable memory, and sources that change before they are read,
* counts the memory of its tensors, and has run out of it beyond a limit.

It shows nothing of CUDA's kernels, their roundings or their speed; of what libraries take for
themselves; of blocks that the allocator keeps for each stream; of a second GPU.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pissa_core import decompose

MAY_MIX = ("copy_", "__getitem__", "__setitem__")
NEVER_MIX = ("cat", "stack")  # not even with a number
WAITS = ("item", "tolist", "equal", "cpu", "nonzero")
WAITS += ("__float__", "__int__", "__bool__", "__index__")
ARITHMETIC_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__")
VIEWS = (Tensor.T, Tensor.mT, Tensor.data)


class PretendedGpu:
    """The device: its memory, its streams, and the copies that are under way.

    Attributes:
        limit: bytes it has.
        peak: most bytes that tensors held at once.
        late: copies that were waited for.
        emptied: how often what is kept for reuse was given back.
    """

    def __init__(self) -> None:
        self.limit = self.total = 8 << 30
        self.used = self.peak = self.late = self.emptied = 0
        self.default = Stream(self)
        self._holders: dict[int, int] = {}  # storages by address: tensors that hold them
        self._streams: dict[int, Stream] = {}
        self._pinned: set[int] = set()
        self._lock = threading.RLock()
        self._current = threading.local()

    def wrap(self, inner: Tensor) -> GpuTensor:
        """Return a tensor of the device that holds what `inner` does."""
        storage = inner.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        tensor = GpuTensor(inner, self)
        if not nbytes:
            return tensor
        with self._lock:
            if address not in self._holders:
                if self.used + nbytes > self.limit:
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {nbytes} bytes."
                    )
                self.used += nbytes
                self.peak = max(self.peak, self.used)
                self._streams[address] = self.stream
            self._holders[address] = self._holders.get(address, 0) + 1
        weakref.finalize(tensor, self._release, address, nbytes)
        return tensor

    def _release(self, address: int, nbytes: int) -> None:
        with self._lock:
            self._holders[address] -= 1
            if not self._holders[address]:
                self.used -= nbytes
                del self._holders[address], self._streams[address]

    @property
    def stream(self) -> Stream:
        """This thread's current stream."""
        return getattr(self._current, "stream", self.default)

    @contextmanager
    def in_stream(self, stream: Stream) -> Iterator[None]:
        """Do what `torch.cuda.stream` does."""
        before = self.stream
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def check(self, tensor: GpuTensor) -> None:
        """Refuse a tensor that another stream wrote and that nobody waited for."""
        writer = self._streams.get(tensor.inner.untyped_storage().data_ptr(), self.stream)
        if writer is not self.stream and writer.busy:
            raise RuntimeError("a tensor of another stream, which has not been waited for")

    def wrote(self, tensor: Tensor) -> None:
        """Note that the current stream has written what a tensor holds."""
        if isinstance(tensor, GpuTensor) and tensor.numel():
            self._streams[tensor.inner.untyped_storage().data_ptr()] = self.stream

    def pin(self, tensor: Tensor) -> Tensor:
        """Count memory of the CPU as page-locked."""
        storage = tensor.untyped_storage()
        self._pinned.add(storage.data_ptr())
        weakref.finalize(storage, self._pinned.discard, storage.data_ptr())
        return tensor

    def copy(self, target: Tensor, source: Tensor, *, late: bool) -> None:
        """Copy between the devices, at once or when the stream is waited for."""
        if not late:
            self.stream.synchronize()
            _inner(target).copy_(_inner(source))
            self.wrote(target)
            return
        host = source if isinstance(target, GpuTensor) else target
        if host.untyped_storage().data_ptr() not in self._pinned:
            raise RuntimeError("a copy of pageable memory that nobody waits for")
        content = _inner(source).clone()
        if host is target:
            target.fill_(math.nan)
            self.stream.begin(lambda: target.copy_(content))
            return
        _inner(target).copy_(content)
        self.wrote(target)
        self.stream.begin(lambda: _same_bytes(source, content))


class Stream:
    """What has been begun and not been waited for."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self._gpu = gpu
        self._begun: list[Callable[[], object]] = []
        self.busy = False

    def begin(self, work: Callable[[], object]) -> None:
        """Leave something to be done until the stream is waited for."""
        self._begun.append(work)
        self.busy = True

    def synchronize(self) -> None:
        """Wait."""
        self.busy = False
        while self._begun:
            self._begun.pop(0)()
            self._gpu.late += 1


class GpuTensor(Tensor):
    """A tensor that says it is on the device, around one on the CPU."""

    inner: Tensor
    gpu: PretendedGpu

    @staticmethod
    def __new__(cls, inner: Tensor, gpu: PretendedGpu) -> GpuTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cuda:0",
        )

    def __init__(self, inner: Tensor, gpu: PretendedGpu) -> None:
        self.inner, self.gpu = inner, gpu

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Meet what is called in Python, before torch asks for a guard that a CPU build lacks."""
        name = func.__name__
        if (name == "__get__" and func.__self__ not in VIEWS) or name in ("__repr__", "__hash__"):
            return super().__torch_function__(func, types, args, kwargs or {})
        return _called(func, name, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} was not asked for in Python")


def _called(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    gpu = ours[0].gpu
    for tensor in ours:
        gpu.check(tensor)
    # A number may come from the CPU, but not be written to.
    all_alike = name in NEVER_MIX or (_is_in_place(name) and not isinstance(tensors[0], GpuTensor))
    strangers = [t for t in tensors if not isinstance(t, GpuTensor) and (t.dim() or all_alike)]
    if strangers and name not in MAY_MIX:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if strangers and name == "copy_":
        gpu.copy(*args[:2], late=any((*args[2:], kwargs.get("non_blocking"))))
        return args[0]
    if name in WAITS:
        gpu.stream.synchronize()
    if name == "numpy":
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return _computed(gpu, func, name, args, kwargs)


def _computed(
    gpu: PretendedGpu, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    device = kwargs.pop("device", "cpu" if name == "cpu" else None)
    pinned = kwargs.pop("pin_memory", None)
    mine = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, GpuTensor)]
    given = {id(leaf.inner): leaf for leaf in mine}
    args, kwargs = tree_map(_inner, (args, kwargs))
    dtype = kwargs.pop("out_dtype", None)  # the CPU has no such kernel
    results = func(*(tree_map(_widened(dtype), args) if dtype else args), **kwargs)

    # No closure: what it holds would stay with the frame of an error.
    leaves, spec = tree_flatten(results)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        if device is not None and torch.device(device).type == "cpu":
            leaves[i] = gpu.pin(leaf) if pinned else leaf.clone()
        else:
            leaves[i] = given[id(leaf)] if id(leaf) in given else gpu.wrap(leaf)
            gpu.stream.busy = True
    if mine and _is_in_place(name):
        gpu.wrote(mine[0])
    return tree_unflatten(leaves, spec)


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and (not name.endswith("__") or name in ARITHMETIC_IN_PLACE)


def _widened(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda value: value.to(dtype) if isinstance(value, Tensor) else value


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, GpuTensor) else value


def _same_bytes(source: Tensor, content: Tensor) -> None:
    if not torch.equal(*(each.contiguous().view(torch.uint8) for each in (source, content))):
        raise RuntimeError("page-locked memory changed before it was copied to the device")


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Have torch see one GPU, of 8 GB, for as long as this lasts."""
    gpu = PretendedGpu()
    cpu_to = Tensor.to

    def made(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, pin_memory: bool = False, **wishes: Any) -> Tensor:
            there = str(wishes.get("device")).startswith("cuda")
            tensor = factory(*args, **wishes | ({"device": "cpu"} if there else {}))
            if pin_memory:
                return gpu.pin(tensor)
            return gpu.wrap(tensor) if there else tensor

        return make

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wished = [*args, kwargs.get("device")]
        device = next((each for each in wished if isinstance(each, str | torch.device)), None)
        if device is None or torch.device(device).type not in ("cpu", "cuda"):
            return cpu_to(self, *args, **kwargs)
        if len(args) > 1 or not {"device", "non_blocking"} >= kwargs.keys():
            raise NotImplementedError("to a device and something else at once")
        there = torch.device(device).type == "cuda"
        if there == isinstance(self, GpuTensor):
            return self
        copy = gpu.wrap(torch.empty_like(self)) if there else torch.empty_like(self, device="cpu")
        return copy.copy_(self, kwargs.get("non_blocking", False))

    def empty_cache() -> None:
        gpu.emptied += 1

    def limit(fraction: float) -> None:
        gpu.limit = int(fraction * gpu.total)

    _device_constructors()  # what `with torch.device(...)` knows: the real ones, once and for all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompose, "_idle_streams", defaultdict(list))
        for name in ("empty", "zeros", "ones", "full", "eye", "arange", "tensor"):
            patch.setattr(torch, name, made(getattr(torch, name)))
        patch.setattr(Tensor, "to", to)
        patch.setattr(Tensor, "cuda", lambda self: self.to(torch.device("cuda:0")))
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "empty_cache": empty_cache,
            "mem_get_info": lambda *_: (gpu.total - gpu.used, gpu.total),
            "set_per_process_memory_fraction": limit,
            "set_device": lambda _: None,
            "current_stream": lambda _: gpu.stream,
            "Stream": lambda *_: Stream(gpu),
            "stream": gpu.in_stream,
        }.items():
            patch.setattr(torch.cuda, name, value)
        yield gpu
