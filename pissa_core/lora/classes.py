"""Which class of transformers loads the model that a plain LoRA is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def class_for(config: Mapping[str, Any]) -> str:
    """Return the class that an adapter_config.json speaks of: its task's, or one it names."""
    mapping = config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    named = named if isinstance(named, str) and named.isidentifier() else None
    return _OF_TASKS.get(str(config.get("task_type"))) or named or "AutoModel"
