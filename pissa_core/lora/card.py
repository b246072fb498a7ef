"""README.md of a converted adapter: how to load it, why its rank is what it is, what was lost."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from huggingface_hub.repocard_data import ModelCardData

from pissa_core.lora.classes import class_for
from pissa_core.lora.form import form_of
from pissa_core.lora.plan import LoraPlan
from pissa_core.report.metadata import make_card

_PLACEHOLDER = "path/to/the/original/model"
_LONGEST_TABLE = 40


def card(plan: LoraPlan, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> bytes:
    """Return the model card.

    Args:
        plan: what was done.
        rows: one row a module.
        config: adapter_config.json of the result.
    """
    sections = [
        _opening(plan),
        _loading(plan, config),
        _rank(plan, rows),
        _figures(plan, rows),
        _lineage(plan),
    ]
    return make_card(_metadata(plan), sections)


def _opening(plan: LoraPlan) -> str:
    name = _shown_base(plan) or "the original model"
    return (
        f"# LoRA for {name}\n\n"
        "A [PiSSA](https://arxiv.org/abs/2404.02948) adapter, trained on a residual model, as "
        "plain LoRA for the **original** model: ΔW = s · (B A − B₀ A₀). It loads with stock PEFT, "
        "beside other LoRA adapters for the same model. It does not fit the residual model."
    )


def _loading(plan: LoraPlan, config: Mapping[str, Any]) -> str:
    model_class = class_for(config)
    at = f", revision={json.dumps(plan.base_revision)}" if plan.base_revision else ""
    base = json.dumps(_shown_base(plan) or _PLACEHOLDER, ensure_ascii=False)
    biases = (
        "\n\nTrained biases are among its tensors. PEFT puts them into the base model itself, "
        "where they stay when another adapter is switched to."
        if config.get("bias") not in (None, "none")
        else ""
    )
    return f"""## Load

```python
from peft import PeftModel
from transformers import {model_class}

base = {model_class}.from_pretrained({base}{at})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```{biases}"""


def _rank(plan: LoraPlan, rows: Sequence[Mapping[str, Any]]) -> str:
    before = Counter(update.trained.rank for update in plan.updates).most_common(1)[0][0]
    after = sorted({row["rank"] for row in rows})
    ranks = f"{after[0]}" if len(after) == 1 else f"{after[0]} to {after[-1]}"
    why = f"""## Why did my rank double?

PiSSA takes s · B₀ A₀ out of each weight before training, and training changes it to s · B A. On
the original weight the update is the difference of the two, and the difference of two matrices of
rank {before} has a rank of up to {2 * before}. So the exact form holds both pairs, [B, −B₀] and \
[A; A₀]."""
    if form_of(plan).compressed:
        return (
            f"{why} Here it was compressed to rank {ranks}: for each module the best approximation "
            "there is of its rank (Eckart-Young), found without forming the update."
        )
    return (
        f"{why} Nothing is lost here. To have a smaller rank, convert again with `--rank` or "
        "`--tolerance`: most of an update usually lies in few directions."
    )


def _figures(plan: LoraPlan, rows: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_kind(row["module"]), []).append(row)
    shown = list(groups.items())[:_LONGEST_TABLE]
    lines = ["| module | number | shape | rank | largest loss |", "|---|---:|---|---|---:|"]
    for kind, group in shown:
        shapes = _few({"×".join(map(str, row["shape"])) for row in group})
        ranks = sorted({row["rank"] for row in group})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        lost = max(row["lost"] for row in group)
        lines.append(f"| `{_no_markup(kind)}` | {len(group)} | {shapes} | {span} | {lost:.1e} |")
    if len(groups) > len(shown):
        lines.append(f"| … and {len(groups) - len(shown)} more kinds | | | | |")
    return "\n".join(
        [
            "## What was done",
            "",
            *lines,
            "",
            "*Loss*: the share of the update's squared singular values that is left out. Each "
            "module has its own row in `pissa_manifest.json`.",
        ]
    )


def _lineage(plan: LoraPlan) -> str:
    options = json.dumps(dict(plan.config), sort_keys=True)
    # A folder's path says nothing to whoever reads the card elsewhere; the manifest has it.
    told = [note for note in plan.notes if " /" not in note]
    notes = "\n".join(f"* {_no_markup(note, ' ,:/@')}" for note in told)
    return (
        f"## Where it comes from\n\nMade by pissa-service from a trained and an initial PiSSA "
        f"adapter, with the options `{options}`. `pissa_manifest.json` names both.\n\n{notes}"
    ).rstrip()


def _metadata(plan: LoraPlan) -> ModelCardData:
    base = _shown_base(plan)
    return ModelCardData(
        library_name="peft",
        tags=["lora", "peft", "pissa"],
        base_model=base,
        base_model_relation="adapter" if base else None,
    )


def _shown_base(plan: LoraPlan) -> str | None:
    """Return the base's repo; a folder's path is for the config alone."""
    if plan.base is None or PurePath(plan.base).is_absolute():
        return None
    return plan.base


def _kind(module: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in module.split("."))


def _few(values: set[str]) -> str:
    ordered = sorted(values)
    return ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")


def _no_markup(text: str, allowed: str = "") -> str:
    """Names can come from anybody's files."""
    return re.sub(rf"[^\w.\-*{re.escape(allowed)}]", "?", text)
