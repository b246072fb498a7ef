"""The model's module tree without weights: transformers' own class on the meta device."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from pissa_core.errors import PissaError, UnsupportedArchitecture
from pissa_core.targets.checkpoint_tree import build_from_keys
from pissa_core.targets.resolve import NamesFrom

if TYPE_CHECKING:
    from pissa_core.layout import Layout

# Where no architecture is named, the class that a model type was pre-trained as comes first.
_HEADS = (
    modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)
_DEPTHS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"} | {
    f"{part}{side}_layers" for part in ("", "num_") for side in ("encoder", "decoder")
}
"""How configs spell the number of layers."""
_MOST_LABELS = 1_000_000
_MODULES, _MODULES_A_TENSOR = 50_000, 100  # more than any class has, dropouts and all


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A module tree on the meta device, and where its names come from."""

    model: PreTrainedModel
    model_class: str | None
    names_from: NamesFrom

    @property
    def native(self) -> bool:
        """Whether the tree is that of a class of transformers."""
        return self.names_from == "transformers"


def build_skeleton(layout: Layout) -> Skeleton:
    """Build the class that config.json names, or a tree from the keys if nobody knows it.

    Raises:
        UnsupportedArchitecture: config.json and the class do not go together.
    """
    named = _named_class(layout.config)
    known = _known_class(layout, named)
    if known is None:
        return Skeleton(build_from_keys(layout, named), named, "checkpoint keys")
    model = _build(known, _read_config(known, layout), len(layout.tensors))
    return Skeleton(model, known.__name__, "transformers")


def _named_class(config: Mapping[str, Any]) -> str | None:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    return None


def _known_class(layout: Layout, named: str | None) -> type[PreTrainedModel] | None:
    """Return the model's class if transformers has it; never a checkpoint's own code."""
    model_type = layout.config.get("model_type")
    if not isinstance(model_type, str | None):
        raise UnsupportedArchitecture(f"config.json: model_type is {model_type!r}, not a string")
    if model_type is not None and model_type not in CONFIG_MAPPING:
        return None
    if named is None and model_type is not None:
        named = _class_by_keys(layout, model_type)
    found: Any = getattr(transformers, named, None) if named and named.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        return None
    # The abstract base has no config of its own.
    return found if found.config_class is not None else None  # type: ignore[attr-defined]


def _class_by_keys(layout: Layout, model_type: str) -> str | None:
    """Choose the class of a config without architectures, by whether the keys have its prefix."""
    for mapping in _HEADS:
        name = mapping.get(model_type)
        name = name[0] if isinstance(name, (tuple, list)) else name
        if name is None:
            continue
        prefix = getattr(transformers, name).base_model_prefix
        if mapping is modeling_auto.MODEL_MAPPING_NAMES or any(
            key.startswith(f"{prefix}.") for key in layout.tensors
        ):
            return str(name)
    return None


def _read_config(model_class: type[PreTrainedModel], layout: Layout) -> PretrainedConfig:
    """Read config.json as `from_pretrained` does, which knows more spellings than `from_dict`."""
    _check_depth(layout.config, len(layout.tensors))
    model_type = layout.config.get("model_type")
    reader = AutoConfig if model_type else model_class.config_class
    with tempfile.TemporaryDirectory(prefix="pissa-config-") as folder, quiet():
        (Path(folder) / "config.json").write_text(json.dumps(dict(layout.config)))
        try:
            config = reader.from_pretrained(folder, trust_remote_code=False)
        except (MemoryError, PissaError):
            raise
        except Exception as error:
            raise UnsupportedArchitecture(
                f"config.json is no config of {model_type or model_class.__name__}: "
                f"{_one_line(error)}"
            ) from error
    # A name left here by the author would have PEFT look the model up on the Hub.
    config._name_or_path = ""
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_depth(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a depth that the checkpoint cannot have, before anything of that size is built.

    A list of labels is built as soon as the config is read.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_depth(value, tensors)
        elif name in _DEPTHS and isinstance(value, int) and value > tensors:
            raise UnsupportedArchitecture(
                f"config.json says {name} = {value}, the checkpoint has only {tensors} tensors"
            )
        elif name == "num_labels" and isinstance(value, int) and value > _MOST_LABELS:
            raise UnsupportedArchitecture(
                f"config.json says num_labels = {value}; at most {_MOST_LABELS} are given names"
            )


def _build(
    model_class: type[PreTrainedModel], config: PretrainedConfig, tensors: int
) -> PreTrainedModel:
    """Build the model as `from_pretrained` does before it loads any weight."""
    try:
        config._attn_implementation = "eager"
        if getattr(config, "use_pretrained_backbone", None):
            config.use_pretrained_backbone = False  # or building would download it
        contexts = model_class.get_init_context(
            torch.float32, is_quantized=False, _is_ds_init_called=False, allow_all_kernels=None
        )
        with contextlib.ExitStack() as stack:
            for context in (quiet(), *contexts, no_init_weights(), _counted(tensors)):
                stack.enter_context(context)
            return model_class(config)
    except (MemoryError, PissaError):
        raise
    except Exception as error:
        raise UnsupportedArchitecture(
            f"{model_class.__name__} cannot be built from config.json: "
            f"{type(error).__name__}: {_one_line(error)}"
        ) from error


@contextlib.contextmanager
def _counted(tensors: int) -> Iterator[None]:
    """Refuse a model that has far more modules than its checkpoint has tensors.

    How often a class repeats something stands in its config under many names.
    """
    most, count = _MODULES + _MODULES_A_TENSOR * tensors, 0

    def one_more(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UnsupportedArchitecture(
                f"config.json describes a model of more than {most:,} modules, and the checkpoint "
                f"has only {tensors:,} tensors",
                hint="one of its numbers of layers or the like is too large",
            )

    hook = register_module_module_registration_hook(one_more)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the model class's own remarks about its config out of our output."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
