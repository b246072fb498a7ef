"""A module tree read from a checkpoint's keys, for classes that transformers does not know.

A checkpoint's own code is never run. Its keys still tell where modules are, and shapes and names
tell Linear from the rest; PEFT then matches names and types on this tree as on any model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from pissa_core.errors import UnsupportedArchitecture

if TYPE_CHECKING:
    from pissa_core.layout import Layout, TensorInfo

_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_layer", "output")
_EMBEDDING = re.compile(r"^(?!.*(proj|map))(.*embed.*|shared|wte|wpe|.*_bias|codebook)$")
_ROUTER = re.compile(r"^(gate|router)$")


class Bare(nn.Module):
    """A module of unknown kind that holds parameters; PEFT adapts no such module."""

    def holds(self, parameter: str) -> bool:
        """Whether a parameter of this name is registered here."""
        return parameter in self._parameters


class CheckpointTree(PreTrainedModel):  # type: ignore[misc]
    """The tree; a `PreTrainedModel` so that PEFT asks it for its output embedding."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig, tensors: Iterable[TensorInfo]) -> None:
        super().__init__(config)
        by_name = {tensor.name: tensor for tensor in tensors}
        mixtures = {name.partition(".experts.")[0] for name in by_name if ".experts." in name}
        for tensor in by_name.values():
            _plant(self, tensor, by_name, mixtures)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head over the vocabulary, which "all-linear" leaves out."""
        for name, module in self.named_modules():
            leaf = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and _is_shallow(name):
                over_vocabulary = module.out_features == self.config.vocab_size
                if leaf in _OUTPUT_EMBEDDINGS or over_vocabulary:
                    return module
        return None


def build_from_keys(layout: Layout, named: str | None) -> PreTrainedModel:
    """Build the tree of a checkpoint on the meta device.

    Raises:
        UnsupportedArchitecture: the keys form no tree, or Linear weights are stored transposed.
    """
    tensors = layout.tensors
    _refuse_transposed(tensors, named)
    # Custom code ties by default, so only an explicit false says that the head is free.
    tied = layout.config.get("tie_word_embeddings") is not False
    vocabulary = layout.config.get("vocab_size")
    config = PretrainedConfig(tie_word_embeddings=tied, vocab_size=vocabulary)
    try:
        with torch.device("meta"), no_init_weights():
            return CheckpointTree(config, tensors.values())
    except KeyError as error:
        raise UnsupportedArchitecture(
            f"{named or 'the model'} is unknown to transformers and the checkpoint's keys form no "
            f"module tree: {error}"
        ) from error


def tied_head(model: PreTrainedModel) -> str | None:
    """Return the path of the output embedding if config.json does not say that it is free."""
    head = model.get_output_embeddings() if isinstance(model, CheckpointTree) else None
    if head is None or not model.config.tie_word_embeddings:
        return None
    return next(str(name) for name, module in model.named_modules() if module is head)


def _is_shallow(name: str) -> bool:
    return not any(part.isdigit() for part in name.split("."))


def _plant(
    root: nn.Module, tensor: TensorInfo, tensors: Mapping[str, TensorInfo], mixtures: set[str]
) -> None:
    """Add the module and the parameter of one tensor, and every module on the way."""
    path, _, leaf = tensor.name.rpartition(".")
    module = root
    walked = ""
    for part in path.split(".") if path else ():
        walked = f"{walked}.{part}" if walked else part
        child = module._modules.get(part)
        if child is None:
            child = _module_at(walked, tensors, mixtures)
            module.add_module(part, child)
        module = child
    if leaf not in module._parameters:
        empty: Any = torch.empty(tensor.shape, device="meta")
        module.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))


def _module_at(path: str, tensors: Mapping[str, TensorInfo], mixtures: set[str]) -> nn.Module:
    weight = tensors.get(f"{path}.weight")
    parent, _, name = path.rpartition(".")
    if weight is None or len(weight.shape) != 2:
        return Bare()
    rows, columns = weight.shape
    if name not in _OUTPUT_EMBEDDINGS and _EMBEDDING.match(name):
        return nn.Embedding(rows, columns)
    if parent in mixtures and _ROUTER.match(name):
        return Bare()
    return nn.Linear(columns, rows, bias=f"{path}.bias" in tensors)


def _refuse_transposed(tensors: Mapping[str, TensorInfo], named: str | None) -> None:
    """A bias as long as the weight's second side shows a layout (in, out), as GPT-2's Conv1D."""
    for name, tensor in tensors.items():
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias")
        if not name.endswith(".weight") or len(tensor.shape) != 2 or bias is None:
            continue
        if bias.shape != tensor.shape[:1] and bias.shape == tensor.shape[1:]:
            raise UnsupportedArchitecture(
                f"{named or 'the model'} is unknown to transformers and stores {name} "
                f"{list(tensor.shape)} with a bias of {bias.shape[0]}: its weights are transposed, "
                "and which of them cannot be told from the keys"
            )
