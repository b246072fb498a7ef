"""Where a saved adapter's tensors belong: PEFT itself puts it on the model without weights."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import NoMatchingPeftModuleError
from torch import nn

from pissa_core.errors import AdaptersDoNotMatch, PissaError, UnsupportedAdapter
from pissa_core.plan import CarriedTensor, Matrix, Refusal
from pissa_core.targets.injection import PREFIX, injected, peft_remarks
from pissa_core.targets.naming import Names, carried_as
from pissa_core.targets.refusals import not_one_tensor, wrong_dtype, wrong_kind, wrong_shape
from pissa_core.targets.skeleton import Skeleton, build_skeleton

if TYPE_CHECKING:
    from pissa_core.layout import Layout
    from pissa_core.targets.injection import Injected

_ADAPTER = "default"
_MATTERS = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias",
    "modules_to_save", "task_type",
)  # fmt: skip
"""The fields of a LoraConfig that say which weights an adapter holds and what they mean."""
_PASSES = (
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_core", "megatron_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
)  # fmt: skip
"""Fields that only training, or the making of an adapter, asks."""
_DORA = (
    "the adapter uses DoRA (use_dora), which scales each row of the merged weight by a trained "
    "magnitude"
)


@dataclass(frozen=True, slots=True)
class Adapted:
    """What an adapter does to a checkpoint.

    Attributes:
        replaced: tensors stored whole, which take the place of the checkpoint's.
        copies: tensors stored whole that are a target's own weight: PEFT saves those of targets it
            takes for embeddings. Merging is right if they are the checkpoint's.
        twins: keys of tensors that are one in the model, so they must be equal in the file.
        model_class: the class named by config.json, if it names one.
    """

    model_class: str | None
    names_from: str
    matrices: tuple[Matrix, ...]
    replaced: tuple[CarriedTensor, ...]
    copies: tuple[CarriedTensor, ...]
    twins: tuple[tuple[str, str], ...]
    refused: tuple[Refusal, ...]


def resolve_adapter(
    layout: Layout, config: Mapping[str, Any], held: Mapping[str, tuple[int, ...]]
) -> Adapted:
    """Tie every tensor of an adapter to the one of the checkpoint that it changes.

    Args:
        layout: the checkpoint.
        config: the adapter's adapter_config.json.
        held: key → shape of every tensor in the adapter's file.

    Raises:
        AdaptersDoNotMatch: no module of the model is a target of the adapter, or the file does
            not hold what its config says it does.
        UnsupportedAdapter: the config asks for what a merge cannot give, or PEFT refuses it.
        UnsupportedArchitecture: no model can be built from config.json.
    """
    _check_fields(config)
    skeleton = build_skeleton(layout)
    names = Names.of(skeleton, layout)
    modules = dict(skeleton.model.named_modules())
    wrapped = _wrap(skeleton, config)
    with peft_remarks():
        saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    _check_keys(shapes, held)
    layers = [
        injected(path.removeprefix(PREFIX), layer, modules)
        for path, layer in wrapped.named_modules()
        if isinstance(layer, LoraLayer)
    ]
    matrices, objected = _targets(layers, names)
    targeted = {layer.parameter for layer in layers}
    whole = _place_whole(held, names, targeted)
    return Adapted(
        model_class=skeleton.model_class,
        names_from=skeleton.names_from,
        matrices=matrices,
        replaced=tuple(whole.replaced),
        copies=tuple(whole.copies),
        twins=tuple(whole.twins),
        refused=(*objected, *whole.refused),
    )


def _check_fields(config: Mapping[str, Any]) -> None:
    if config.get("use_dora"):
        raise UnsupportedAdapter(
            f"{_DORA}; only W = R + scaling · B · A is folded",
            hint="merge it with PEFT's own merge_and_unload",
        )
    for name, value in config.items():
        if name not in (*_MATTERS, *_PASSES) and value:
            raise UnsupportedAdapter(
                f"the adapter's config sets {name}, whose effect on the weights is not that of "
                "W = R + scaling · B · A",
                hint="merge it with PEFT's own merge_and_unload",
            )


def _wrap(skeleton: Skeleton, config: Mapping[str, Any]) -> PeftModel:
    # Copied, since PEFT writes into the lists it is given.
    given = {name: config[name] for name in _MATTERS if config.get(name) is not None}
    values = copy.deepcopy(given)
    if not skeleton.native:
        values.pop("task_type", None)
    try:
        with peft_remarks():
            lora = LoraConfig(**values, init_lora_weights=False)
            return get_peft_model(skeleton.model, lora, low_cpu_mem_usage=True)
    except (MemoryError, PissaError):
        raise
    except NoMatchingPeftModuleError as error:
        raise AdaptersDoNotMatch(
            "no module of the model is a target of the adapter: target_modules="
            f"{str(config.get('target_modules'))[:200]}",
            hint="the adapter was made for a model of another architecture",
        ) from error
    except Exception as error:
        named = skeleton.model_class or "the model"
        raise UnsupportedAdapter(
            f"PEFT cannot put this adapter on {named}: {' '.join(str(error).split())[:400]}"
        ) from error


def _check_keys(wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file that lacks a tensor, holds one that nothing uses, or one of another shape."""
    missing = [key for key in wanted if key not in held and not _is_copy(key)]
    if missing:
        raise AdaptersDoNotMatch(
            f"the adapter has no tensor {missing[0]}, which its config asks for on this model"
            + _more(missing),
            hint="the adapter was made for another model, or its file is incomplete",
        )
    unused = [key for key in held if ".lora_" in key and key not in wanted]
    if unused:
        raise AdaptersDoNotMatch(
            f"the adapter holds {unused[0][:200]}, which is no target of its config on this model"
            + _more(unused),
            hint="the adapter was made for another model, or its config was edited",
        )
    for key, shape in wanted.items():
        if key in held and held[key] != shape:
            raise AdaptersDoNotMatch(
                f"{key} has the shape {list(held[key])}, and its config asks for {list(shape)} on "
                "this model",
                hint="the adapter has another rank than its config says, or another base",
            )


def _more(names: list[str]) -> str:
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""


def _targets(layers: Iterable[Injected], names: Names) -> tuple[tuple[Matrix, ...], list[Refusal]]:
    matrices: list[Matrix] = []
    refused: list[Refusal] = []
    for layer in layers:
        objection = _object_to(layer, names)
        if objection is not None:
            refused.append(Refusal(layer.module, *objection))
        else:
            matrices.append(_matrix(layer, names))
    return tuple(matrices), refused


def _object_to(layer: Injected, names: Names) -> tuple[str, str] | None:
    if other := names.tied.get(layer.parameter):
        return "tied_weight", (
            f"its weight is shared with {other}, which the merge would change as well"
        )
    plain_embedding = type(layer.base) is nn.Embedding
    if not plain_embedding and (objection := wrong_kind(layer, names)):
        return objection
    checks = (not_one_tensor, wrong_dtype, wrong_shape)
    return next(filter(None, (check(layer, names) for check in checks)), None)


def _matrix(layer: Injected, names: Names) -> Matrix:
    tensor = names.stored[layer.parameter][0].tensor
    rows, columns = tensor.shape
    embeds = isinstance(layer.base, nn.Embedding)
    stem = f"{PREFIX}{layer.module}."
    keys = (
        ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")
    )
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
        # An embedding's rows are looked up, so B · A is added to it turned.
        transposed=layer.transposed or embeds,
        key_a=stem + keys[0],
        key_b=stem + keys[1],
    )


def _is_copy(key: str) -> bool:
    # With bias="all" PEFT saves a saved module's bias three times, once as what it was.
    return ".original_module." in key or ".modules_to_save." in key


@dataclass(slots=True)
class _Whole:
    """What the adapter stores whole: where each tensor goes, and which must be equal."""

    replaced: list[CarriedTensor]
    copies: list[CarriedTensor]
    twins: list[tuple[str, str]]
    refused: list[Refusal]


def _place_whole(
    held: Mapping[str, tuple[int, ...]], names: Names, targeted: Collection[str]
) -> _Whole:
    """Find the place of what the adapter stores whole: saved modules, embeddings, biases."""
    whole = _Whole([], [], [], [])
    keys = {_parameter(key): key for key in held if ".lora_" not in key and not _is_copy(key)}
    for parameter, key in keys.items():
        other = names.tied.get(parameter)
        if parameter in targeted:
            _place(parameter, key, held[key], names, whole, whole.copies)
        elif other is not None and other not in keys:
            reason = f"the adapter trains it whole, and it is shared with {other}"
            whole.refused.append(Refusal(parameter, "tied_weight", reason))
        elif other is not None and parameter not in names.stored:
            whole.twins.append((key, keys[other]))
        else:
            _place(parameter, key, held[key], names, whole, whole.replaced)
    return whole


def _parameter(key: str) -> str:
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _place(
    parameter: str,
    key: str,
    shape: tuple[int, ...],
    names: Names,
    whole: _Whole,
    among: list[CarriedTensor],
) -> None:
    stored = names.stored.get(parameter, ())
    if len(stored) != 1 or stored[0].converted or stored[0].tensor.shape != shape:
        reason = (
            f"the adapter stores it whole {list(shape)}, and the checkpoint has no tensor of that "
            "shape in its place"
        )
        whole.refused.append(Refusal(parameter, "unsupported_adapter", reason))
        return
    among.append(carried_as(key, stored[0].tensor))
