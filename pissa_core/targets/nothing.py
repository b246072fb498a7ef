"""Explain why no module is a target: what was looked for, and what comes close."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from pissa_core.errors import NothingMatched
from pissa_core.spec import PissaConfig
from pissa_core.targets.notes import close_to, linear_leaves


def explain_nothing(config: PissaConfig, modules: Mapping[str, nn.Module]) -> NothingMatched:
    """Return the error, with the patterns in its message and the next step in its hint."""
    asked = {
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
    }
    given = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
    return NothingMatched(
        f"no module of the model is a target: {given}", hint=_hint(config, modules)
    )


def _hint(config: PissaConfig, modules: Mapping[str, nn.Module]) -> str:
    linear = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))]
    leaves = linear_leaves(modules)
    targets = config.target_modules
    if isinstance(targets, str) and _is_leaf(targets, linear):
        return (
            f"a string is a regular expression that must match the whole path, {linear[0]!r} for "
            f'example; write ["{targets}"] to match by the end of the path'
        )
    wanted = [targets] if isinstance(targets, str) else targets
    close = [match for name in wanted for match in close_to(name, leaves)]
    if any(_is_leaf(name, linear) for name in wanted) or targets == "all-linear":
        return "the targets exist, but exclude_modules, layers_to_transform or task_type drop them"
    if close:
        return f"similar names in this model: {', '.join(dict.fromkeys(close))}"
    return f"this model's linear modules end in {', '.join(leaves) or 'nothing'}"


def _is_leaf(name: str, modules: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)
