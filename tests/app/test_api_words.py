"""Errors in HTTP's words: a status for every code, secrets made unreadable, ranges read right."""

from __future__ import annotations

import json

import pytest

from app.errors import looks_like_hub_token, problem, redacted, status_of
from app.routes.deps import etag_matches
from app.routes.results import one_range
from pissa_core.errors import PissaError, all_errors, error_from

TOKEN = "hf_" + "aB3" * 11


def test_every_error_has_the_status_its_kind_calls_for():
    # What only the command says (that a service is not there) never becomes an answer, nor do
    # the errors of other tests.
    named = [
        kind
        for kind in all_errors()
        if "code" in vars(kind)
        and kind.__module__.startswith(("pissa_core.", "worker.", "app."))
        and not kind.__module__.startswith("app.cli.")
    ]
    assert len(named) > 40
    for kind in named:
        assert (status_of(kind("why")) == 500) == (kind.code == "internal"), kind


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("repo_not_found", 404), ("revision_not_found", 404), ("folder_not_found", 404),
        ("gated_repo", 403), ("no_read_access", 403), ("no_write_access", 403),
        ("token_invalid", 401), ("rate_limited", 429), ("hub_unavailable", 503),
        ("no_safetensors", 422), ("rank_too_large", 422), ("nothing_matched", 422),
        ("output_exists", 422), ("plan_timeout", 504), ("store_unavailable", 503),
        ("idempotency_mismatch", 422), ("conflict", 409), ("internal", 500),
    ],
)  # fmt: skip
def test_statuses_of_the_contract(code, status):
    assert status_of(error_from(code, "why")) == status


def test_a_code_of_a_newer_worker_is_internal_to_http_and_keeps_its_name():
    answer = problem(error_from("brand_new", "why"))
    assert answer.status_code == 500
    assert json.loads(answer.body)["code"] == "brand_new"


def test_a_problem_has_every_member_and_its_media_type():
    answer = problem(PissaError("a sentence", hint="try that"))
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(json.loads(answer.body)) == {
        "type", "title", "status", "detail", "code", "hint", "errors",
    }  # fmt: skip


def test_secrets_are_unreadable_wherever_they_stand():
    data = {"detail": f"no {TOKEN}", "errors": [{"loc": ["x", 1], "msg": "key-of-mine!"}]}
    assert redacted(data, ["key-of-mine!"]) == {
        "detail": "no hf_***",
        "errors": [{"loc": ["x", 1], "msg": "***"}],
    }


def test_a_short_name_is_no_token():
    assert looks_like_hub_token(f"x {TOKEN}")
    assert not looks_like_hub_token("hf_internal/model")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)), ("bytes=2-5", (2, 6)), ("bytes=2-", (2, 10)),
        ("bytes=-3", (7, 10)), ("bytes=-30", (0, 10)), ("bytes=5-99", (5, 10)),
        ("Bytes=1-2", (1, 3)),
    ],
)  # fmt: skip
def test_a_range_is_read(header, expected):
    assert one_range(header, 10) == expected


@pytest.mark.parametrize(
    "header",
    ["", "bytes", "bytes=", "bytes=-", "bytes=a-b", "items=0-1", "bytes=5-2", "bytes=0-1,4-5",
     "bytes=+1-2", "bytes=1_0-", "bytes=²-"],
)  # fmt: skip
def test_what_is_no_single_range_is_ignored(header):
    assert one_range(header, 10) is None


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-20", "bytes=-0"])
def test_a_range_behind_the_end_is_refused(header):
    with pytest.raises(PissaError, match="10 bytes") as caught:
        one_range(header, 10)
    assert caught.value.code == "range_not_satisfiable"


@pytest.mark.parametrize("header", ['W/"a"', '"a"', '"b", W/"a"', "*"])
def test_an_etag_matches_weakly(header):
    assert etag_matches(header, 'W/"a"')


@pytest.mark.parametrize("header", [None, '"b"', "a", ""])
def test_another_etag_does_not_match(header):
    assert not etag_matches(header, 'W/"a"')
