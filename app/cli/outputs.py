"""Options about an output on the Hub, shared by the commands that publish one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import click

from pissa_core.ports import PublishOptions
from pissa_core.refs import LocalRef, Ref, parse_output

P = ParamSpec("P")
R = TypeVar("R")

_OPTIONS = (
    click.option("--private", is_flag=True, help="Make the repo a private one (Hub)."),
    click.option("--branch", metavar="NAME", help="Publish on this branch (Hub); default: main."),
    click.option("--overwrite", is_flag=True, help="Replace what the branch holds (Hub)."),
    click.option("--commit-message", metavar="TEXT", help="Of the commit that publishes (Hub)."),
)
_NAMES = ("private", "branch", "overwrite", "commit_message")


def output_options(command: Callable[P, R]) -> Callable[..., R]:
    """``--private``, ``--branch``, ``--overwrite``, ``--commit-message``.

    The command receives those that were given together, as `publish`: the fields that REST's
    ``output`` has besides ``ref``.
    """

    @functools.wraps(command)
    def with_output(*args: Any, **kwargs: Any) -> R:
        given = {name: kwargs.pop(name) for name in _NAMES}
        kwargs["publish"] = {name: value for name, value in given.items() if value}
        return command(*args, **kwargs)

    decorated: Callable[..., R] = with_output
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def required_output(out: str, publish: Mapping[str, Any]) -> Ref:
    """Read ``--out`` with the options about it.

    Raises:
        InvalidReference: if a result cannot go there.
        UsageError: if the options are given for a folder.
    """
    ref = parse_output(out, publish.get("branch"))
    if isinstance(ref, LocalRef):
        refuse(publish)
    return ref


def refuse(publish: Mapping[str, Any]) -> None:
    """Refuse options about an output on the Hub where there is none."""
    for name in publish:
        flag = "--" + name.replace("_", "-")
        raise click.UsageError(f"{flag} is about an output on the Hub; name one with --out")


def options_of(publish: Mapping[str, Any]) -> PublishOptions:
    """Return the terms of publishing; the branch is part of the reference."""
    return PublishOptions(**{name: value for name, value in publish.items() if name != "branch"})
