"""The tree of errors: every code once, as the docstring draws it."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from pissa_core import errors
from pissa_core.errors import PissaError, all_errors, error_from

OURS = [kind for kind in all_errors() if kind.__module__ == errors.__name__]
FAMILIES = {kind for kind in OURS if kind.__subclasses__()}


def test_every_code_belongs_to_one_class():
    counts = Counter(kind.code for kind in OURS if kind not in FAMILIES)
    assert [code for code, count in counts.items() if count > 1] == []


def test_the_docstring_draws_the_tree_as_it_is():
    drawn = dict(re.findall(r"[├└]── (\w+) +([a-z_]+)(?: +retryable)?$", errors.__doc__, re.M))
    assert drawn == {kind.__name__: kind.code for kind in OURS if kind not in FAMILIES}
    retryable = set(re.findall(r"── (\w+) +[a-z_]+ +retryable$", errors.__doc__, re.M))
    assert retryable == {kind.__name__ for kind in OURS if kind.retryable}


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind not in FAMILIES])
def test_an_error_survives_the_wire(kind):
    error = error_from(**kind("what went wrong", hint="what to try").as_dict())
    assert type(error) is kind
    assert (error.message, error.hint) == ("what went wrong", "what to try")


def test_an_unknown_code_keeps_its_name():
    error = error_from("from_the_future", "something new")
    assert isinstance(error, PissaError)
    assert error.code == "from_the_future"
    assert PissaError("another").code == "internal"
    assert type(error) in OURS, "a class made on the way would stay among all errors for good"
