"""layout + config → targets: the one page that tells the order of the questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pissa_core.plan import CarriedTensor, Matrix, Refusal
from pissa_core.spec import PissaConfig

if TYPE_CHECKING:
    from pissa_core.layout import Layout

NamesFrom = Literal["transformers", "checkpoint keys"]


@dataclass(frozen=True, slots=True)
class Targets:
    """What PEFT would adapt in this checkpoint, and what of it cannot be converted.

    Attributes:
        model_class: the class named by config.json, if it names one.
        names_from: whether module paths are those of transformers' class or were read from the
            checkpoint's keys, because transformers does not know the class.
        adapter_config: what PEFT's adapter_config.json holds, but for the base model's name.
        notes: what of the config has no effect, in sentences.
    """

    model_class: str | None
    names_from: NamesFrom
    matrices: tuple[Matrix, ...]
    carried: tuple[CarriedTensor, ...]
    adapter_config: Mapping[str, Any]
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...] = ()


def resolve_targets(layout: Layout, config: PissaConfig) -> Targets:
    """Decide by PEFT's own rules which tensors of a checkpoint are decomposed, and how.

    Nothing is read but headers and config.json; no code of the checkpoint is run. The first
    call in a process imports transformers and peft, which takes seconds.

    Raises:
        NothingMatched: no module is a target; the message repeats the patterns.
        UnsupportedArchitecture: no model can be built from config.json, or PEFT fails on it.
        InvalidConfig: a pattern that only PEFT could judge.
    """
    # Imported here: torch, transformers and peft take seconds, and only planning needs them.
    from pissa_core.targets.adapter_config import check_reload
    from pissa_core.targets.injection import inject
    from pissa_core.targets.naming import Names
    from pissa_core.targets.refusals import judge
    from pissa_core.targets.skeleton import build_skeleton
    from pissa_core.targets.tasks import settle_task

    skeleton = build_skeleton(layout)
    names = Names.of(skeleton, layout)
    task, contradictions = settle_task(skeleton, config.task_type)
    injection = inject(skeleton, config, task, rebuild=lambda: build_skeleton(layout))
    verdict = judge(injection, names)
    refused = (*contradictions, *injection.refused, *verdict.refused)
    if not refused:
        wanted = [layer.module for layer in injection.layers]
        check_reload(injection.adapter_config, injection.modules, wanted)
    return Targets(
        model_class=skeleton.model_class,
        names_from=skeleton.names_from,
        matrices=verdict.matrices,
        carried=verdict.carried,
        adapter_config=injection.adapter_config,
        refused=refused,
        notes=injection.notes,
    )
