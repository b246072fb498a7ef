"""What of a config has no effect, in sentences that are the same every time."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from textwrap import shorten

from torch import nn
from transformers.pytorch_utils import Conv1D

from pissa_core.spec import PissaConfig

_MOST = 10
_LONGEST = 300
_NOTHING_EXCLUDED = re.compile(r"You have passed exclude_modules=")
_PATTERN_UNMATCHED = re.compile(r"The following (rank|alpha)_pattern keys did not match")


def notes_on(
    config: PissaConfig, modules: Mapping[str, nn.Module] | None, remarks: Iterable[str]
) -> tuple[str, ...]:
    """Return what the user should know of a config.

    Args:
        config: what was asked.
        modules: of the model, by path, before anything was injected; None where the targets go by
            other names there.
        remarks: what PEFT warned of.
    """
    unknown = () if modules is None else _names_of_nothing(config, modules)
    return (*unknown, *_in_our_words(config, remarks))


def is_about_the_config(remark: str) -> bool:
    """Say whether a warning of PEFT's is one that `notes_on` knows."""
    return any(known.match(remark) for known in (_NOTHING_EXCLUDED, _PATTERN_UNMATCHED))


def linear_leaves(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the last parts of the paths of what can be decomposed, sorted."""
    linear = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))]
    return sorted({name.rpartition(".")[2] for name in linear})


def close_to(name: str, leaves: Iterable[str]) -> list[str]:
    """Return up to three of the leaves that a name may have been meant for."""
    return difflib.get_close_matches(name.rpartition(".")[2][:_LONGEST], leaves, n=3)


def _names_of_nothing(config: PissaConfig, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield a sentence for each of several targets that is the name of no module, ten at most."""
    if isinstance(config.target_modules, str):
        return
    ends = {end for path in modules for end in _ends(path)}
    unknown = [name for name in dict.fromkeys(config.target_modules) if name not in ends]
    leaves = linear_leaves(modules) if unknown else []
    for name in unknown[:_MOST]:
        close = close_to(name, leaves)
        similar = f"; similar names in this model: {', '.join(close)}" if close else ""
        yield f"no module is named {_short(repr(name))}, as target_modules has it{similar}"
    if len(unknown) > _MOST:
        yield f"{len(unknown) - _MOST} more of target_modules are the names of no module"


def _ends(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.partition(".")[2]


def _in_our_words(config: PissaConfig, remarks: Iterable[str]) -> Iterator[str]:
    for remark in dict.fromkeys(remarks):
        if _NOTHING_EXCLUDED.match(remark):
            # PEFT prints a set, whose order is another in every process.
            asked = _short(repr(config.exclude_modules))
            yield f"exclude_modules={asked} excludes none of the targets"
        elif (of := _PATTERN_UNMATCHED.match(remark)) and getattr(config, f"{of[1]}_pattern"):
            yield _short(remark)  # of a pattern that is the user's and not PEFT's own


def _short(text: str) -> str:
    return shorten(text, _LONGEST, placeholder=" …") if len(text) > _LONGEST else text
