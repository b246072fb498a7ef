"""Checkpoint keys tied to parameters with transformers' own renaming."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from pissa_core.plan import CarriedTensor
from pissa_core.targets.checkpoint_tree import tied_head
from pissa_core.targets.skeleton import Skeleton

if TYPE_CHECKING:
    from pissa_core.layout import Layout, TensorInfo


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the checkpoint that goes into a parameter.

    Attributes:
        converted: transformers does not load it as it is, but merges, splits or turns it.
    """

    tensor: TensorInfo
    converted: bool


@dataclass(frozen=True, slots=True)
class Names:
    """What is known of each parameter of the model.

    Attributes:
        stored: parameter → the tensors that go into it.
        tied: parameter → another parameter that is the same tensor in the loaded model.
        shapes: parameter → its shape in the model.
    """

    stored: Mapping[str, tuple[Stored, ...]]
    tied: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, skeleton: Skeleton, layout: Layout) -> Names:
        """Tie every tensor of a checkpoint to the parameters of a model not yet wrapped."""
        model = skeleton.model
        state = model.state_dict()
        if skeleton.native:
            stored = _renamed(model, state, layout.tensors.values())
        else:
            stored = {name: (Stored(tensor, False),) for name, tensor in layout.tensors.items()}
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        return cls(stored, _tied(model), shapes)


def _renamed(
    model: PreTrainedModel, state: Mapping[str, object], tensors: Iterable[TensorInfo]
) -> dict[str, tuple[Stored, ...]]:
    """Follow `from_pretrained`: rename, convert, and add or drop the base model's prefix."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix
    made_from = {pattern: each for each in converters for pattern in each.source_patterns}
    found: defaultdict[str, tuple[Stored, ...]] = defaultdict(tuple)
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        name, pattern = rename_source_key(tensor.name, renamings, converters, prefix, state)
        if name not in state and tensor.name in state:
            name, pattern = rename_source_key(tensor.name, [], [], prefix, state)
        for parameter in [name] if pattern is None else _made(name, made_from[pattern]):
            if parameter in state:
                found[parameter] += (Stored(tensor, pattern is not None),)
    return dict(found)


def carried_as(key: str, tensor: TensorInfo) -> CarriedTensor:
    """Return a tensor of the checkpoint as the adapter stores it whole, under a key of PEFT's."""
    return CarriedTensor(
        key=key,
        tensor=tensor.name,
        shard=tensor.shard,
        dtype=tensor.dtype,
        shape=tensor.shape,
        start=tensor.start,
        stop=tensor.stop,
    )


def _made(first: str, converter: WeightConverter) -> Iterator[str]:
    """Yield every parameter a converter makes; renaming tells only the first."""
    for target in converter.target_patterns:
        yield first.replace(converter.target_patterns[0], target)


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Return every parameter that shares its tensor with another, and one such other.

    Some share by config (an output head and its embedding), some because one module stands at
    two places of the tree, where PEFT would wrap only the first.
    """
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        tied[target] = source
        tied.setdefault(source, target)
    places: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    for names in places.values():
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            if name != other:
                tied.setdefault(name, other)
    head = tied_head(model)
    if head is not None:
        tied.setdefault(f"{head}.weight", "the input embedding")
    return tied
