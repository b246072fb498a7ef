"""adapter_config.json as PEFT saves it, made the same every time and safe to load again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from pissa_core.errors import UnsupportedArchitecture
from pissa_core.targets.skeleton import Skeleton

if TYPE_CHECKING:
    from pissa_core.targets.injection import Injected


def saved_config(
    lora: LoraConfig, skeleton: Skeleton, layers: Sequence[Injected], task: str | None
) -> dict[str, Any]:
    """Return what `save_pretrained` would write, ready to be loaded on the residual model.

    It differs from PEFT's in three points: `init_lora_weights` is true, since the residual must
    not be decomposed again; sets are sorted; patterns whose order matters are made explicit,
    since PEFT sorts them when it saves. The base model's name is left to the caller.
    """
    saved = {key: _plain(value) for key, value in lora.to_dict().items()}
    for name in ("base_model_name_or_path", "revision"):
        saved.pop(name)
    saved |= {"init_lora_weights": True, "inference_mode": True, "task_type": task}
    saved["modules_to_save"] = _unique(saved["modules_to_save"])
    for field, default in (("rank_pattern", lora.r), ("alpha_pattern", lora.lora_alpha)):
        saved[field] = _order_free(saved[field], default, [layer.module for layer in layers])
    if task is None and skeleton.native:
        model_class = type(skeleton.model)
        saved["auto_mapping"] = {
            "base_model_class": model_class.__name__,
            "parent_library": model_class.__module__,
        }
    return saved


def check_reload(saved: Mapping[str, Any], modules: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuse a saved config that would choose other of the `modules` than were `wanted`."""
    reloaded = LoraConfig(**saved)
    again = {name for name in modules if name and check_target_module_exists(reloaded, name)}
    if odd := again.symmetric_difference(wanted):
        raise UnsupportedArchitecture(
            f"the saved target_modules would not choose the same modules again: {min(odd)} differs",
            hint="name the targets by a list or a regular expression",
        )


def _plain(value: Any) -> Any:
    """Return a JSON value, the same in every process: a set has no order of its own."""
    return json.loads(json.dumps(value, default=sorted))


def _unique(names: list[str] | None) -> list[str] | None:
    # PEFT's task classes append their head's names to those already there.
    return None if names is None else list(dict.fromkeys(names))


def _order_free(patterns: dict[str, Any], default: Any, modules: Sequence[str]) -> dict[str, Any]:
    """Return patterns that mean the same in any order; the first match wins, says PEFT."""
    resorted = dict(sorted(patterns.items()))
    values = {name: _value_for(name, patterns, default) for name in modules}
    if all(_value_for(name, resorted, default) == value for name, value in values.items()):
        return patterns
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def _value_for(module: str, patterns: dict[str, Any], default: Any) -> Any:
    return patterns.get(get_pattern_key(patterns.keys(), module), default)
