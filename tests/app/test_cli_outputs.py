"""Options about an output on the Hub: what is asked of the service, and what is refused."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from app.cli.local import convert
from app.cli.submission import submit
from pissa_core.errors import InvalidReference
from pissa_core.refs import HubRef, parse_output


@pytest.mark.parametrize(
    ("text", "branch", "expected"),
    [
        ("me/out", None, HubRef("me/out")),
        ("me/out", "main", HubRef("me/out")),
        ("me/out@main", None, HubRef("me/out")),
        ("hf://me/out@r16", None, HubRef("me/out", "r16")),
        ("me/out@r16", "r16", HubRef("me/out", "r16")),
        ("me/out", "a/b", HubRef("me/out", "a/b")),
    ],
)
def test_a_branch_is_said_in_the_reference_or_besides(text, branch, expected):
    assert parse_output(text, branch) == expected


@pytest.mark.parametrize(
    ("text", "branch", "reason"),
    [
        ("out", None, "owner"),
        ("hf://me/out/folder", None, "whole repo"),
        ("me/out@a", "b", "another branch"),
        ("me/out", "pissa-staging-0", "cannot be the name"),
        ("me/out", "refs/pr/1", "cannot be the name"),
        ("me/out", "0" * 40, "cannot be the name"),
        *(("me/out", name, "cannot be the name") for name in ("a b", "a..b", "-a", "a/", "a.lock")),
    ],
)
def test_where_a_result_cannot_go(text, branch, reason):
    with pytest.raises(InvalidReference, match=reason):
        parse_output(text, branch)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (convert, ["org/name", "--out", "./out", "--private"]),
        (convert, ["org/name", "--out", "me/out@a", "--branch", "b"]),
        (submit, ["org/name", "--overwrite"]),
        (submit, ["org/name", "--out", "./out", "--branch", "b"]),
        (submit, ["org/name", "--out", "out"]),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_opened(command, arguments):
    done = CliRunner().invoke(command, arguments, obj={"debug": False}, standalone_mode=False)
    assert isinstance(done.exception, click.UsageError | InvalidReference)
