"""README.md of a result: how to load and train it, where it comes from, what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from shlex import quote
from typing import Any

from huggingface_hub.repocard_data import ModelCardData

from pissa_core.plan import Plan
from pissa_core.refs import HubRef, parse_ref
from pissa_core.report.figures import Row, by_kind, energy_share, in_plan_order, totals
from pissa_core.report.metadata import kept_metadata, make_card, split_card

LOCAL_PLACEHOLDER = "path/to/this/folder"
ORIGINAL_CARD = "# The card of the original model"
"""Above what is kept of the source's card."""
_LONGEST_TABLE = 40


def card(
    plan: Plan,
    rows: Sequence[Row],
    *,
    base_model_name_or_path: str,
    source_card: str | None,
    revision: str | None = None,
) -> bytes:
    """Return the model card, the source's own card kept below ours.

    Args:
        plan: what was done.
        rows: one row a matrix, in any order.
        base_model_name_or_path: repo id of the output; a path stands for a local output and is
            not written, so that the card does not depend on where it lies.
        source_card: the source's README.md, metadata included.
        revision: the output's branch, if it is not the default one.
    """
    metadata, body = split_card(source_card or "")
    ordered = in_plan_order(plan, rows)
    here = (
        LOCAL_PLACEHOLDER
        if PurePath(base_model_name_or_path).is_absolute()
        else (base_model_name_or_path)
    )
    sections = [
        _opening(plan),
        _loading(plan, here, revision),
        _converting_back(here, revision),
        _warning(),
        _figures(plan, ordered),
        _lineage(plan),
    ]
    if body.strip():
        sections.append(f"---\n\n{ORIGINAL_CARD}\n\n{body.strip()}")
    return make_card(metadata_of(plan, metadata), sections)


def _opening(plan: Plan) -> str:
    return (
        f"# {_source_name(plan)}, PiSSA form, rank {plan.config['rank']}\n\n"
        "This repo holds a model split in two by "
        "[PiSSA](https://arxiv.org/abs/2404.02948): W = R + scaling · B · A. "
        "The **residual model** R is at the root; the **initial adapter** (A and B, the "
        "principal singular directions) is in `pissa_init/`. Together they are the original "
        "model; training starts at the adapter. No SVD is needed to load it."
    )


def _loading(plan: Plan, here: str, revision: str | None) -> str:
    model_class = plan.model_class or "AutoModel"
    at = f", revision={json.dumps(revision)}" if revision else ""
    unknown = (
        "\n\ntransformers did not know this architecture when the repo was made: load the base "
        "as the original's card says."
        if plan.model_class is None
        else ""
    )
    return f"""## Load and train

```python
from peft import PeftModel
from transformers import {model_class}

here = {json.dumps(here, ensure_ascii=False)}
base = {model_class}.from_pretrained(here{at})
model = PeftModel.from_pretrained(
    base, here, subfolder="pissa_init", is_trainable=True{at}
)
model.print_trainable_parameters()
# … train as any PEFT model, then:
model.save_pretrained("trained")
```

What `save_pretrained` writes belongs on top of this residual model. Keep `pissa_init/`: without
the initial adapter a trained one cannot be turned into a LoRA for the original model.{unknown}"""


def _converting_back(here: str, revision: str | None) -> str:
    local = here == LOCAL_PLACEHOLDER
    residual = f"./{here}" if local else str(HubRef(here, revision))
    initial = f"{residual}/pissa_init" if local else str(HubRef(here, revision, "pissa_init"))
    return f"""## Convert back

```bash
# plain LoRA for the original model
pissa to-lora --initial {quote(initial)} --trained ./trained --out ./lora
# one plain model, the adapter merged in
pissa to-base --residual {quote(residual)} --adapter ./trained --out ./merged
```"""


def _warning() -> str:
    return """> [!WARNING]
> The weights at the root are **not** the original model's. Without an adapter made for them
> they give other outputs, and adapters (LoRA, PiSSA, …) made for the original model do not fit
> here. Always load them with `pissa_init/` or with an adapter trained from it."""


def _figures(plan: Plan, rows: Sequence[Row]) -> str:
    groups = by_kind(rows)
    lines = [
        "| module | matrices | shape | rank | energy | largest missed | recombination error |",
        "|---|---:|---|---|---:|---:|---:|",
    ]
    shown = list(groups.items())[:_LONGEST_TABLE]
    lines += [_figures_line(f"`{_no_markup(kind)}`", group) for kind, group in shown]
    if len(groups) > len(shown):
        lines.append(f"| … and {len(groups) - len(shown)} more kinds | | | | | | |")
    lines.append(_figures_line("**all**", rows, total=True))
    parameters = totals(plan, rows).trainable_parameters
    return "\n".join(
        [
            "## What was measured",
            "",
            *lines,
            "",
            "*Energy*: the share of the squared Frobenius norm that lies in the adapter. *Missed*: "
            "an estimate from above, which is no proven bound, of the share of the best possible "
            "energy that is not in it. "
            "*Recombination error*: ‖W − (R + scaling · B · A)‖ / ‖W‖ with everything as stored. "
            f"Trainable parameters: {parameters:,}. Each matrix has its own row in "
            "`pissa_manifest.json`.",
            "",
            "![Energy captured, by layer and module](pissa_report/energy.svg)",
            "",
            "![Top singular values, by module](pissa_report/spectra.svg)",
        ]
    )


def _figures_line(label: str, rows: Sequence[Row], *, total: bool = False) -> str:
    energy = energy_share(rows)
    shapes = "" if total else _few({"×".join(map(str, row["shape"])) for row in rows})
    ranks = "" if total else _few({str(row["rank"]) for row in rows})
    missed = max(row["missed"] for row in rows)
    error = max(row["recombination_error"] for row in rows)
    share = "–" if energy is None else f"{100 * energy:.2f} %"
    return f"| {label} | {len(rows)} | {shapes} | {ranks} | {share} | {missed:.1e} | {error:.1e} |"


def _no_markup(name: str) -> str:
    """Names can come from the checkpoint's keys, which are anybody's text."""
    return re.sub(r"[^\w.\-]", "?", name)


def _few(values: set[str]) -> str:
    ordered = sorted(values)
    return ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")


def _lineage(plan: Plan) -> str:
    repo = _source_repo(plan)
    origin = f"[{repo}](https://huggingface.co/{repo})" if repo else "a local folder"
    commit = f" at commit `{plan.commit}`" if plan.commit else ""
    left_out = f"\n\n{left_out_note(plan)}" if plan.card_without else ""
    config = json.dumps(dict(plan.config), indent=2, sort_keys=True, ensure_ascii=False)
    return f"""## Where it comes from

Made from {origin}{commit} by pissa-service, with this config:

```json
{config}
```{left_out}"""


def left_out_note(plan: Plan) -> str:
    """Say which of the original card's metadata the result's card is without."""
    fields = ", ".join(f"`{field}`" for field in plan.card_without)
    return f"The Hub refuses {fields} as the source's card has it; this card leaves it out."


def metadata_of(plan: Plan, source: Mapping[str, Any]) -> ModelCardData:
    """Return the YAML block: ours, and of the source's what still holds (licence, language)."""
    carried, kept = kept_metadata(source, plan.card_without)
    repo = _source_repo(plan)
    if repo:
        # The root holds changed weights of its own, which the Hub's vocabulary calls a finetune;
        # "adapter" would promise that the root loads as one.
        carried |= {"base_model": repo, "base_model_relation": "finetune"}
    return ModelCardData(
        library_name="transformers",
        tags=[*dict.fromkeys([*kept, "pissa", "peft", "lora", "residual"])],
        **carried,
    )


def _source_repo(plan: Plan) -> str | None:
    if not plan.source.startswith("hf://"):
        return None
    ref = parse_ref(plan.source)
    return ref.repo_id if isinstance(ref, HubRef) else None


def _source_name(plan: Plan) -> str:
    return _source_repo(plan) or PurePath(plan.source).name or "A model"
