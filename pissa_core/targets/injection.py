"""PEFT injects its LoRA layers into a model without weights; they are read back from it."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import NoMatchingPeftModuleError
from torch import nn

from pissa_core.errors import InvalidConfig, PissaError, UnsupportedModule
from pissa_core.plan import Refusal
from pissa_core.spec import PissaConfig
from pissa_core.targets.adapter_config import saved_config
from pissa_core.targets.notes import is_about_the_config, notes_on
from pissa_core.targets.nothing import explain_nothing
from pissa_core.targets.skeleton import Skeleton
from pissa_core.targets.tasks import HEADS

PREFIX = "base_model.model."
_ADAPTER = "default"
_SETTLED = re.compile(
    r"fan_in_fan_out is set to|Model has `tie_word_embeddings=True`|Setting `save_embedding_layers`"
    r"|target_modules=.* were set but no module was matched"
    # PEFT's own affair with transformers.
    r"|`is_gradient_checkpointing` is deprecated"
)


@dataclass(frozen=True, slots=True)
class Injected:
    """One LoRA layer as PEFT made it, and the module it stands on.

    Attributes:
        parameter: full name of the parameter that is adapted.
        parent: the module whose forward calls `base`.
    """

    module: str
    parameter: str
    base: nn.Module
    parent: nn.Module
    rank: int
    scaling: float
    transposed: bool

    @property
    def key_a(self) -> str:
        """PEFT's key of A in the adapter file."""
        return f"{PREFIX}{self.module}.lora_A.weight"

    @property
    def key_b(self) -> str:
        """PEFT's key of B in the adapter file."""
        return f"{PREFIX}{self.module}.lora_B.weight"


@dataclass(frozen=True, slots=True)
class Injection:
    """All that PEFT did to the model.

    Attributes:
        carried: adapter key → parameter of the model, for tensors stored whole.
        modules: every module path of the model before the injection.
        notes: what of the config has no effect, in sentences.
    """

    layers: tuple[Injected, ...]
    carried: Mapping[str, str]
    adapter_config: Mapping[str, Any]
    modules: tuple[str, ...]
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...] = ()


def inject(
    skeleton: Skeleton, config: PissaConfig, task: str | None, rebuild: Callable[[], Skeleton]
) -> Injection:
    """Let PEFT choose and wrap the targets; what it refuses is noted and left out.

    Args:
        skeleton: changed in place.
        config: what was asked.
        task: PEFT's task type.
        rebuild: gives a fresh skeleton, for a second try without what PEFT refuses.

    Raises:
        NothingMatched: no module is a target.
        InvalidConfig: a pattern is not a regular expression once PEFT has put it together.
        UnsupportedModule: PEFT refuses the targets as a whole.
    """
    modules = dict(skeleton.model.named_modules())
    try:
        return _read_back(*_wrap(skeleton, config, task, modules), skeleton, task, modules)
    except (PissaError, MemoryError):
        raise
    except NoMatchingPeftModuleError as error:
        raise explain_nothing(config, modules) from error
    except re.error as error:
        raise InvalidConfig(
            f"a pattern of the config is not a regular expression: {error}"
        ) from error
    except Exception as error:
        refused = _refused_by_peft(rebuild(), config, task)
        if not refused:
            name = skeleton.model_class or "this model"
            raise UnsupportedModule(
                f"PEFT cannot adapt these targets in {name}: {error}",
                hint="name other modules in target_modules",
            ) from error
    return _without_refused(rebuild(), config, task, refused)


def _wrap(
    skeleton: Skeleton,
    config: PissaConfig,
    task: str | None,
    modules: Mapping[str, nn.Module],
    without: Iterable[str] = (),
) -> tuple[PeftModel, tuple[str, ...]]:
    """Let PEFT inject its layers; return what it made, and what of the config has no effect."""
    # A tree of unknown class lacks the methods that PEFT's task classes ask for, and needs none.
    lora = _lora_config(config, task, with_task=skeleton.native, without=without)
    asked = copy.copy(lora.target_modules)
    with peft_remarks() as remarks:
        wrapped = get_peft_model(skeleton.model, lora, low_cpu_mem_usage=True)
    # Names of an older transformers are the new ones' to PEFT, and none of them is a module.
    found = wrapped.peft_config[_ADAPTER].target_modules
    translated = isinstance(asked, set) and found != asked
    return wrapped, notes_on(config, None if translated else modules, remarks)


def _lora_config(
    config: PissaConfig, task: str | None, *, with_task: bool, without: Iterable[str] = ()
) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
        exclude_modules=_excluding(config.exclude_modules, list(without)),
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        modules_to_save=list(HEADS.get(task or "", ())) or None,
        task_type=task if with_task else None,
        init_lora_weights=False,
    )


def _excluding(excluded: str | list[str] | None, more: list[str]) -> str | list[str] | None:
    if not more:
        return excluded
    if isinstance(excluded, str):
        return "|".join([f"(?:{excluded})", *map(re.escape, more)])
    return [*(excluded or ()), *more]


@contextlib.contextmanager
def peft_remarks() -> Iterator[list[str]]:
    """Collect PEFT's warnings, but for what the plan settles; others' go where they always go."""
    remarks: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield remarks
    for remark in caught:
        if is_about_the_config(str(remark.message)):
            remarks.append(" ".join(str(remark.message).split()))
        elif not _SETTLED.match(str(remark.message)):
            warnings.warn_explicit(remark.message, remark.category, remark.filename, remark.lineno)


def _read_back(
    wrapped: PeftModel,
    notes: tuple[str, ...],
    skeleton: Skeleton,
    task: str | None,
    modules: Mapping[str, nn.Module],
    refused: tuple[Refusal, ...] = (),
) -> Injection:
    """Collect PEFT's layers in the order of the model, and every key it would save."""
    with peft_remarks():
        keys = list(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    found = tuple(
        injected(name.removeprefix(PREFIX), layer, modules)
        for name, layer in wrapped.named_modules()
        if isinstance(layer, LoraLayer)
    )
    return Injection(
        layers=found,
        carried={key: key.removeprefix(PREFIX) for key in keys if ".lora_" not in key},
        adapter_config=saved_config(wrapped.peft_config[_ADAPTER], skeleton, found, task),
        modules=tuple(modules),
        refused=refused,
        notes=notes,
    )


def injected(name: str, layer: LoraLayer, modules: Mapping[str, nn.Module]) -> Injected:
    """Read one LoRA layer back; `modules` are those of the model before the injection."""
    # PEFT nests one wrapper into the other where several bare parameters of a module are adapted.
    name = name.replace(".base_layer", "")
    parent = name.rpartition(".")[0]
    return Injected(
        module=name,
        parameter=f"{name}.{getattr(layer, 'parameter_name', None) or 'weight'}",
        base=modules[name],
        parent=modules[parent],
        rank=layer.r[_ADAPTER],
        scaling=layer.scaling[_ADAPTER],
        transposed=bool(getattr(layer, "fan_in_fan_out", False)),
    )


def _without_refused(
    skeleton: Skeleton, config: PissaConfig, task: str | None, refused: Mapping[str, str]
) -> Injection:
    """Inject again without what PEFT refuses, so that the plan can judge the rest as well."""
    modules = dict(skeleton.model.named_modules())
    refusals = tuple(Refusal(name, "unsupported_module", why) for name, why in refused.items())
    try:
        made = _wrap(skeleton, config, task, modules, without=refused)
    except NoMatchingPeftModuleError:
        return Injection((), {}, {}, tuple(modules), refusals, notes_on(config, modules, ()))
    return _read_back(*made, skeleton, task, modules, refusals)


def _refused_by_peft(skeleton: Skeleton, config: PissaConfig, task: str | None) -> dict[str, str]:
    """Return each module that PEFT matches and refuses, and its reason in a sentence."""
    refused: dict[str, str] = {}

    class Recorder(LoraModel):  # type: ignore[misc]
        """PEFT's own injection, which goes on where it would stop at the first refusal."""

        def _check_target_module_compatiblity(self, *_: Any) -> None:
            """Leave the check to `_create_and_replace`, which knows the module's path."""

        def _create_and_replace(
            self, lora: Any, adapter: str, target: nn.Module, name: str, *rest: Any, **kw: Any
        ) -> None:
            try:
                LoraModel._check_target_module_compatiblity(self, lora, self.model, name)
                super()._create_and_replace(lora, adapter, target, name, *rest, **kw)
            except (MemoryError, PissaError):
                raise
            except Exception as error:  # noqa: BLE001 - any refusal of PEFT is recorded
                refused[kw["current_key"]] = _reason(target, error)

    lora = _lora_config(config, task, with_task=False)
    with peft_remarks():
        try:
            Recorder(skeleton.model, lora, _ADAPTER, low_cpu_mem_usage=True)
        except (MemoryError, PissaError):
            raise
        except Exception:  # noqa: BLE001 - what is recorded says enough
            pass
    return refused


def _reason(target: nn.Module, error: Exception) -> str:
    if isinstance(target, nn.Linear):
        sentence = re.sub(r"^\[.*?\]\s*", "", str(error)).partition(". ")[0]
        return f"PEFT refuses it: {sentence}"
    return f"it is a {type(target).__name__}; only Linear and Conv1D can be decomposed"
