"""Bodies of requests: what is accepted, and how a refusal names place, code and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from app.errors import InvalidFields
from app.intake import Intake, accept
from worker.contract import JobRequest

SCHEMA: TypeAdapter[Any] = TypeAdapter(JobRequest)


def taken(data: object, root: Path | None = None) -> Intake:
    return accept(json.dumps(data).encode(), SCHEMA, root)


def refused(data: object, root: Path | None = None) -> InvalidFields:
    with pytest.raises(InvalidFields) as caught:
        taken(data, root)
    return caught.value


def test_defaults_are_filled_in():
    request = taken({"kind": "base-to-pissa", "model": "org/name"}).request
    assert request.model == "org/name"
    assert request.output is None
    assert request.pissa.rank == 16


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "pissa-to-lora", "initial": "a/b", "trained": "a/c", "lora": {"rank": None}},
        {"kind": "pissa-to-lora", "trained": "a/c", "output": "a/d", "lora": {"tolerance": 0.01}},
        {"kind": "pissa-to-base", "residual": "a/b", "adapter": "a/c", "output": {"ref": "a/d"}},
        {"kind": "verify", "original": "a/b", "converted": "a/c"},
    ],
)
def test_every_kind_of_job_is_accepted_and_survives_the_store(data):
    request = taken(data).request
    assert request.kind == data["kind"]
    assert SCHEMA.validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize(
    ("options", "place"),
    [({"rank": 0}, "lora.rank"), ({"tolerance": 1}, "lora.tolerance"), ({"r": 8}, "lora.r")],
)
def test_a_fault_in_the_options_of_a_lora_is_invalid_config(options, place):
    error = refused({"kind": "pissa-to-lora", "trained": "org/name", "lora": options})
    assert error.cause.code == "invalid_config"
    assert error.cause.message.startswith(f"{place}: ")


@pytest.mark.parametrize("field", ["initial", "trained"])
def test_references_of_every_kind_stay_below_the_root(field):
    body = {"kind": "pissa-to-lora", "trained": "org/name", field: "./adapter"}
    assert refused(body).cause.code == "outside_local_root"


def test_an_output_may_be_a_reference_or_an_object():
    short = taken({"model": "org/name", "output": "hf://me/name"}).request
    long = taken({"model": "org/name", "output": {"ref": "hf://me/name"}}).request
    assert short == long


def test_the_digest_is_the_body_s_and_not_its_spelling():
    one = accept(b'{"model": "org/name", "pissa": {"rank": 8}}', SCHEMA, None)
    same = accept(b'{ "pissa":{"rank":8},"model":"org/name" }', SCHEMA, None)
    other = accept(b'{"model": "org/name", "pissa": {"rank": 9}}', SCHEMA, None)
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("config", "place", "words"),
    [
        ({"rank": 0}, "pissa.rank", "it must be greater than or equal to 1 (got 0)"),
        ({"rank": "many"}, "pissa.rank", "a whole number is needed (got 'many')"),
        ({"rank": "16"}, "pissa.rank", "(got '16')"),
        ({"use_rslora": 0}, "pissa.use_rslora", "(got 0)"),
        ({"rang": 8}, "pissa.rang", "there is no such field"),
        ({"lora_alpha": 0}, "pissa.lora_alpha", "greater than 0 (got 0)"),
        ({"target_modules": 7}, "pissa.target_modules", "text or a list is needed (got 7)"),
        ({"lora_alpha": "x"}, "pissa.lora_alpha", ": a number is needed (got 'x')"),
        ({"lora_alpha": -0.5}, "pissa.lora_alpha", "it must be greater than 0 (got -0.5)"),
        ({"target_modules": ["q", 7]}, "pissa.target_modules.1", "text is needed (got 7)"),
        ({"rank_pattern": {"q": 0}}, "pissa.rank_pattern.q", "(got 0)"),
        ({"svd": {"method": "fast"}}, "pissa.svd.method", "(got 'fast')"),
        ({"target_modules": []}, "pissa", "empty list"),
        ({"target_modules": "("}, "pissa", "not a regular expression"),
        ({"rounding": "peft", "adapter_dtype": "float16"}, "pissa", "needs adapter_dtype"),
        ([], "pissa", "an object is needed"),
    ],
)
def test_a_fault_in_the_config_is_invalid_config(config, place, words):
    error = refused({"model": "org/name", "pissa": config})
    assert error.cause.code == "invalid_config"
    assert error.cause.message.startswith(f"{place}: ")
    assert words in error.cause.message
    assert error.errors[0]["loc"][:2] == ["body", "pissa"]


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ({}, "model"),
        ({"model": 3}, "model"),
        ({"kind": "nonsense", "model": "org/name"}, "kind"),
        ({"kind": None, "model": "org/name"}, "kind"),
        ({"kind": ["verify"], "model": "org/name"}, "kind"),
        ({"kind": "pissa-to-lora", "initial": "org/name"}, "trained"),
        ({"kind": "pissa-to-lora", "trained": "org/name", "model": "org/name"}, "model"),
        ({"kind": "pissa-to-base", "residual": "org/name"}, "adapter"),
        ({"kind": "verify", "original": "a/b", "converted": "a/c", "output": "a/d"}, "output"),
        ({"model": "org/name", "hub_token": "secret"}, "hub_token"),
        ({"model": "org/name", "output": {"ref": "me/x", "private": "perhaps"}}, "output.private"),
        ({"model": "org/name", "output": {"ref": "me/x", "pissa": 1}}, "output.pissa"),
        ({"model": "org/name", "output": 7}, "output"),
    ],
)
def test_a_fault_elsewhere_is_invalid_request(data, place):
    error = refused(data)
    assert error.cause.code == "invalid_request"
    assert error.cause.message.startswith(f"{place}: ")
    assert error.errors[0]["loc"] == ["body", *place.split(".")]


def test_a_place_names_nothing_that_the_body_does_not_hold():
    error = refused({"model": "org/name", "pissa": {"lora_alpha": "x", "target_modules": [7]}})
    assert {tuple(item["loc"][2:]) for item in error.errors} == {
        ("lora_alpha",), ("target_modules", 0),
    }  # fmt: skip


def test_every_fault_is_listed():
    error = refused({"model": "org/name", "pissa": {"rank": 0, "nothing": 1}})
    assert [item["loc"][-1] for item in error.errors] == ["rank", "nothing"]


def test_a_long_value_does_not_come_back():
    error = refused({"model": "org/name", "pissa": {"rank": "x" * 500}})
    assert "xxx" not in json.dumps(error.errors) + error.cause.message


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"a": "\\ud800"}',
        b'{"a": 1} trailing', b'{"a": ' + b"9" * 10_000 + b"}",
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused(body):
    with pytest.raises(InvalidFields, match="not JSON") as caught:
        accept(body, SCHEMA, None)
    assert caught.value.cause.code == "invalid_request"


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"[]", "an array"), (b"null", "null"), (b"1", "a number"), (b"true", "a boolean")],
)
def test_the_body_must_be_an_object(body, kind):
    with pytest.raises(InvalidFields, match=f"not {kind}"):
        accept(body, SCHEMA, None)


@pytest.mark.parametrize("field", ["model", "output"])
@pytest.mark.parametrize("text", ["", "a b", "https://example.org/x", "hf://", "x" * 5000])
def test_a_bad_reference_names_its_field(field, text):
    error = refused({"model": "org/name", field: text})
    assert error.cause.code == "invalid_reference"
    assert error.errors[0]["loc"] == ["body", field]


def test_a_bad_reference_inside_the_output_names_its_place():
    error = refused({"model": "org/name", "output": {"ref": "a b"}})
    assert error.errors[0]["loc"] == ["body", "output", "ref"]


def test_without_a_local_root_local_folders_are_refused():
    error = refused({"model": "./model"})
    assert error.cause.code == "outside_local_root"
    assert "PISSA_LOCAL_ROOT" in (error.cause.hint or "")


def test_below_the_local_root_folders_are_accepted(tmp_path):
    assert taken({"model": "./model", "output": str(tmp_path / "out")}, tmp_path)


@pytest.mark.parametrize("text", ["../x", "./a/../../x", "/etc", "file:///etc", "file:..%2Fx"])
def test_outside_the_local_root_is_refused(tmp_path, text):
    (tmp_path / "root").mkdir()
    assert refused({"model": text}, tmp_path / "root").cause.code == "outside_local_root"


def test_a_symlink_out_of_the_local_root_is_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    assert refused({"model": "./link/x"}, root).cause.code == "outside_local_root"


@pytest.mark.parametrize(
    "data",
    [
        {"model": "org/name", "output": {"ref": "me/x", "commit_message": "TOKEN"}},
        {"model": "org/name", "pissa": {"target_modules": ["TOKEN"]}},
        {"model": "org/name", "TOKEN": 1},
    ],
)
def test_a_token_in_the_body_is_refused_and_not_repeated(data):
    token = "hf_" + "aB3" * 11
    error = refused(json.loads(json.dumps(data).replace("TOKEN", token)))
    assert error.cause.code == "invalid_request"
    assert "X-Hub-Token" in (error.cause.hint or "")
    assert token not in error.cause.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
references = st.text(max_size=20) | st.sampled_from(["file:%00", "./a\u202e", "~x", "/", "file:"])


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {"model": references | json_values},
        optional={
            "output": references | json_values,
            "pissa": json_values
            | st.dictionaries(
                st.sampled_from(
                    ["rank", "lora_alpha", "target_modules", "svd", "rank_pattern", "task_type",
                     "layers_to_transform", "init_lora_weights", "exclude_modules"]
                ),
                json_values,
            ),
        },
    )
)  # fmt: skip
def test_no_body_is_answered_with_anything_but_a_request_or_a_refusal(tmp_path_factory, data):
    assert outcome(data, tmp_path_factory.getbasetemp()) in {
        "accepted", "invalid_request", "invalid_config", "invalid_reference", "outside_local_root",
    }  # fmt: skip


def outcome(data: object, root: Path) -> str:
    try:
        taken(data, root)
    except InvalidFields as error:
        return error.cause.code if error.errors else "no place named"
    return "accepted"
