"""The adapter's task type: inferred from the model's class, or checked against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers.models.auto import modeling_auto

from pissa_core.plan import Refusal
from pissa_core.targets.skeleton import Skeleton

HEADS: Mapping[str, list[str]] = {
    # What PEFT adds to `modules_to_save` for each task by itself. Given beforehand, so that the
    # head is no target either: for two of the three PEFT adds it only after the injection.
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
_CLASSES: Mapping[str, Mapping[str, object]] = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
}
_SUFFIXES = {
    # What custom code calls its classes, by convention.
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_2_SEQ_LM": (),
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("Model",),
}
_INFERRED = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def settle_task(skeleton: Skeleton, given: str | None) -> tuple[str | None, tuple[Refusal, ...]]:
    """Return the task type for the adapter, and a refusal if the class contradicts the given."""
    fitting = [task for task in _CLASSES if _fits(skeleton, task)]
    if given is None:
        return next((task for task in _INFERRED if task in fitting), None), ()
    if given in fitting or skeleton.model_class is None:
        return given, ()
    known = f"; it fits {' or '.join(fitting)}" if fitting else ""
    reason = f"task_type {given!r} does not fit the model's class {skeleton.model_class}{known}"
    return None, (Refusal("task_type", "invalid_config", reason),)


def _fits(skeleton: Skeleton, task: str) -> bool:
    name = skeleton.model_class or ""
    if not skeleton.native:
        return name.endswith(_SUFFIXES[task])
    return name in _flatten(_CLASSES[task].values())


def _flatten(names: Iterable[object]) -> set[str]:
    return {
        str(name)
        for entry in names
        for name in (entry if isinstance(entry, (tuple, list)) else (entry,))
    }
