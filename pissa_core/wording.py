"""What pydantic finds wrong with data from outside, in words for whoever wrote the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

Found = Mapping[str, Any] | ErrorDetails
Place = tuple[int | str, ...]

_LONGEST_ECHO = 80
_NEEDED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_SENTENCES = {
    "extra_forbidden": "there is no such field",
    "missing": "it is missing",
    "string_pattern_mismatch": "it is not written as it must be",
}
_PREFIXES = {
    "Value error, ": "",
    "Input should be ": "it must be ",
    "String should have ": "it must have ",
}


@dataclass(frozen=True, slots=True)
class Wrong:
    """One place of the data that is wrong, and a sentence that says why."""

    place: Place
    why: str


def wrongs(found: Iterable[Found], data: object) -> list[Wrong]:
    """Say what is wrong, once a place.

    Where a field may be one of several types, pydantic tells what each of them objects to: what
    lies deeper, or is more than the type, is of the one that was meant.
    """
    places: dict[Place, list[Found]] = {}
    for item in found:
        places.setdefault(tuple(place_of(item, data)), []).append(item)
    return [
        Wrong(place, _why(items))
        for place, items in places.items()
        if not (_only_types(items) and any(_is_below(other, place) for other in places))
    ]


def sentence_of(item: Found) -> str:
    """Say what is wrong with one value, without the value."""
    kind, message = item["type"], item["msg"]
    if kind in _NEEDED:
        return f"{_NEEDED[kind]} is needed"
    if kind in _SENTENCES:
        return _SENTENCES[kind]
    for prefix, ours in _PREFIXES.items():
        if message.startswith(prefix):
            return ours + message.removeprefix(prefix)
    return message


def place_of(item: Found, data: object) -> list[int | str]:
    """Return where in `data` a fault lies, without the names of a union's branches."""
    place: list[int | str] = []
    for part in item["loc"]:
        if isinstance(data, Mapping) and part in data:  # noqa: SIM114 - another kind of key each
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part]
        elif item["type"] != "missing" or part != item["loc"][-1]:
            continue
        place.append(part)
    return place


def _why(items: Sequence[Found]) -> str:
    telling = [item for item in items if item["type"] not in _NEEDED]
    if telling:
        return _with_value(sentence_of(telling[0]), telling[0])
    needed = dict.fromkeys(_NEEDED[item["type"]] for item in items)
    if "a number" in needed:
        needed.pop("a whole number", None)
    return _with_value(f"{' or '.join(needed)} is needed", items[0])


def _with_value(sentence: str, item: Found) -> str:
    """Add what was given, if it is short and plain, and not what a sentence of ours names."""
    given = item["input"]
    if item["type"] in ("value_error", "extra_forbidden") or not _is_plain(given):
        return sentence
    shown = repr(given)
    return sentence if len(shown) > _LONGEST_ECHO else f"{sentence} (got {shown})"


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | None)


def _only_types(items: Sequence[Found]) -> bool:
    return all(item["type"] in _NEEDED for item in items)


def _is_below(other: Place, place: Place) -> bool:
    return len(other) > len(place) and other[: len(place)] == place
