"""The YAML block of a source's card: what of it holds for a result, and what the place takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub.repocard_data import ModelCardData

# The Hub's own idea of where a card's metadata ends (huggingface_hub.repocard).
_FRONT_MATTER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
_LONGEST = 1 << 20  # characters, which take seconds; tables of results fill half as many
_CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
_TOGETHER = (
    ("license", "license_name", "license_link"),  # "other" is nothing without its name
    ("language",),
    ("pipeline_tag",),
    ("tags",),
    ("base_model",),
)
FIELDS = tuple(field for group in _TOGETHER for field in group)
"""What a result's card may have from the source's."""


def kept_metadata(
    source: Mapping[str, Any], without: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Return what of a source's metadata holds for a model made from it, and its tags."""
    source = {name: value for name, value in source.items() if name not in without}
    carried = {name: source[name] for name in _CARRIED_OVER if _is_text_or_texts(source.get(name))}
    tags = source.get("tags")
    return carried, list(tags) if isinstance(tags, list) and _is_text_or_texts(tags) else []


def split_card(text: str) -> tuple[Mapping[str, Any], str]:
    """Split a card into metadata and body; metadata that is no YAML mapping counts as none."""
    match = _FRONT_MATTER.search(text)
    if match is None:
        return {}, text
    try:
        data = yaml.safe_load(match[2]) if len(match[2]) <= _LONGEST else None
    except (yaml.YAMLError, ValueError, RecursionError):
        data = None
    return (data if isinstance(data, dict) else {}), text[match.end() :]


def make_card(metadata: ModelCardData, sections: Sequence[str]) -> bytes:
    """Put a card together, as the Hub's own `ModelCard` writes one: metadata, then the text."""
    # Not by `ModelCard`: its module brings all of the Hub's client along, for 0.2 s.
    content = f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    # A lone surrogate (JSON can smuggle one into a name) must not end a job at its last step.
    return content.encode(errors="replace")


def refused_fields(is_taken: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """Return the fields without which a card is taken, as few as that needs.

    Args:
        is_taken: whether the place takes a card that leaves these fields out; asked once where it
            takes everything.
    """
    if is_taken(()):
        return ()
    without = FIELDS
    for group in _TOGETHER:
        fewer = tuple(field for field in without if field not in group)
        if is_taken(fewer):
            without = fewer
    return without


def _is_text_or_texts(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) and bool(value)
