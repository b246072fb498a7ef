"""Judge each layer that PEFT injected: decompose its tensor, or refuse it with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from pissa_core.plan import CarriedTensor, Matrix, Refusal
from pissa_core.targets.bypass import uses_bare_weight
from pissa_core.targets.checkpoint_tree import Bare
from pissa_core.targets.injection import Injected, Injection
from pissa_core.targets.naming import Names, Stored, carried_as

DTYPES = ("F32", "F16", "BF16")
_LINEAR_BY_ANOTHER_NAME = ("FalconLinear",)
"""Subclasses of Linear whose own forward computes the same."""
_Objection = tuple[str, str]
"""A code and a reason."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the targets."""

    matrices: tuple[Matrix, ...]
    carried: tuple[CarriedTensor, ...]
    refused: tuple[Refusal, ...]


def judge(injection: Injection, names: Names) -> Verdict:
    """Turn each layer into a matrix, or into the first objection to it."""
    matrices: list[Matrix] = []
    refused: list[Refusal] = []
    for layer in injection.layers:
        objection = next(filter(None, (check(layer, names) for check in _CHECKS)), None)
        if objection is not None:
            refused.append(Refusal(_name(layer), *objection))
        else:
            matrices.append(_matrix(layer, names))
    carried, missing = _carry(injection, names)
    return Verdict(tuple(matrices), tuple(carried), (*refused, *missing))


def _name(layer: Injected) -> str:
    """The module, or the bare parameter where PEFT adapts one."""
    is_weight = layer.parameter == f"{layer.module}.weight"
    return layer.module if is_weight else layer.parameter


def _matrix(layer: Injected, names: Names) -> Matrix:
    tensor = names.stored[layer.parameter][0].tensor
    rows, columns = tensor.shape
    return Matrix(
        module=layer.module,
        tensor=tensor.name,
        shard=tensor.shard,
        dtype=tensor.dtype,
        shape=(rows, columns),
        start=tensor.start,
        stop=tensor.stop,
        rank=layer.rank,
        scaling=layer.scaling,
        transposed=layer.transposed,
        key_a=layer.key_a,
        key_b=layer.key_b,
    )


def wrong_kind(layer: Injected, _: Names) -> _Objection | None:
    """Object to a layer that is no matrix its module multiplies by."""
    kind = type(layer.base).__name__
    if isinstance(layer.base, (nn.Linear, Conv1D)):
        plain = type(layer.base).forward in (nn.Linear.forward, Conv1D.forward)
        if plain or kind in _LINEAR_BY_ANOTHER_NAME:
            return None
        return "unsupported_module", (
            f"a {kind} does more than multiply by its weight, so W = R + s·B·A does not hold for it"
        )
    if layer.parameter != f"{layer.module}.weight":
        shape = list(layer.base.get_parameter(layer.parameter.rpartition(".")[2]).shape)
        return "unsupported_module", (
            f"it is a fused parameter {shape} of {kind}, not a Linear: PEFT has no PiSSA for it"
        )
    if isinstance(layer.base, nn.Embedding):
        return "unsupported_module", (
            "it is an Embedding, where PEFT silently makes a plain LoRA instead of PiSSA"
        )
    return "unsupported_module", f"it is a {kind}; only Linear and Conv1D can be decomposed"


def _tied(layer: Injected, names: Names) -> _Objection | None:
    other = names.tied.get(layer.parameter)
    if other is None:
        return None
    return "tied_weight", (
        f"its weight is shared with {other}, which would become a residual with no adapter"
    )


def _bypassed(layer: Injected, _: Names) -> _Objection | None:
    child = layer.module.rpartition(".")[2]
    if not uses_bare_weight(layer.parent, child):
        return None
    return "unsupported_module", (
        f"{_owner(layer)} multiplies by its bare weight ({child}.weight) without calling it, so "
        "the adapter would be passed by and the residual used alone"
    )


def _owner(layer: Injected) -> str:
    if isinstance(layer.parent, Bare):
        return f"a module like {layer.module.rpartition('.')[0]}"
    return type(layer.parent).__name__


def not_one_tensor(layer: Injected, names: Names) -> _Objection | None:
    """Object to a layer whose weight is not exactly one tensor of the checkpoint."""
    stored = names.stored.get(layer.parameter, ())
    if not stored:
        return "ambiguous_name", (
            f"the checkpoint has no tensor for {layer.parameter}, which is made anew on every "
            "loading; exclude it"
        )
    if len(stored) > 1 and not _converted(stored):
        found = " and ".join(each.tensor.name for each in stored)
        return "ambiguous_name", f"the tensors {found} both go into {layer.parameter}"
    if _converted(stored):
        return "unsupported_module", (
            f"transformers makes its weight out of {stored[0].tensor.name} on loading, so the "
            "checkpoint has no matrix of its own for it"
        )
    return None


def _converted(stored: tuple[Stored, ...]) -> bool:
    return any(each.converted for each in stored)


def wrong_dtype(layer: Injected, names: Names) -> _Objection | None:
    """Object to a weight of a dtype that is not computed with."""
    tensor = names.stored[layer.parameter][0].tensor
    if tensor.dtype in DTYPES:
        return None
    return "unsupported_dtype", (
        f"{tensor.name} is {tensor.dtype}; PiSSA takes {', '.join(DTYPES)}"
    )


def wrong_shape(layer: Injected, names: Names) -> _Objection | None:
    """Object to a tensor of another shape than config.json asks for."""
    tensor = names.stored[layer.parameter][0].tensor
    if tensor.shape == names.shapes[layer.parameter] and len(tensor.shape) == 2:
        return None
    return "unsupported_architecture", (
        f"{tensor.name} has the shape {list(tensor.shape)}, config.json asks for "
        f"{list(names.shapes[layer.parameter])}"
    )


def _rank_too_large(layer: Injected, names: Names) -> _Objection | None:
    tensor = names.stored[layer.parameter][0].tensor
    if layer.rank <= min(tensor.shape):
        return None
    return "rank_too_large", (
        f"rank {layer.rank} exceeds {min(tensor.shape)}, the highest that {tensor.name} of shape "
        f"{list(tensor.shape)} can have; exclude it, or give it a smaller one in rank_pattern"
    )


_CHECKS: tuple[Callable[[Injected, Names], _Objection | None], ...] = (
    wrong_kind,
    _tied,
    _bypassed,
    not_one_tensor,
    wrong_dtype,
    wrong_shape,
    _rank_too_large,
)


def _carry(injection: Injection, names: Names) -> tuple[list[CarriedTensor], list[Refusal]]:
    """Find the tensors that the adapter stores whole: the head that a task trains."""
    carried: list[CarriedTensor] = []
    missing: list[Refusal] = []
    for key, parameter in injection.carried.items():
        stored = names.stored.get(parameter, ())
        if len(stored) != 1 or _converted(stored):
            reason = "the task trains this head, and the checkpoint has no tensor of its own for it"
            missing.append(Refusal(parameter, "ambiguous_name", reason))
            continue
        carried.append(carried_as(key, stored[0].tensor))
    return carried, missing
