"""Why something is not sealed on the Hub: what is gone, revoked or called off meanwhile."""

from __future__ import annotations

import threading

import pytest
from hub.faults import Fault
from hub_tools import IN, OUT
from places import contents_of, named_seal_in

from pissa_core import leaving
from pissa_core.errors import RepoNotFound, TokenInvalid


def test_a_repo_that_is_removed_midway_is_said_to_be_gone(hub, open_hub_sink):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    with sink.attempt("model.safetensors"):
        pass
    del hub.repos[OUT]
    with pytest.raises(RepoNotFound, match="was there when this began") as caught:
        sink._staging.required()
    assert caught.value.hint


@pytest.mark.parametrize("status", [401, 404])
def test_a_token_that_is_revoked_midway_is_said_to_be(hub, open_hub_sink, status):
    """The Hub may answer as if the repo were not there to one whom it does not know."""
    token = hub.create_token("somebody")
    sink = open_hub_sink(OUT, token)
    with sink.attempt("model.safetensors"):
        pass
    hub.tokens[token].valid = False
    hub.faults.add(Fault("/api/models/", times=10, status=status, code="RepoNotFound"))
    with pytest.raises(TokenInvalid, match="revoked"):
        sink._staging.required()
    assert contents_of(hub, OUT) == {}


def test_one_whose_lease_is_over_seals_nothing(hub, open_hub_sink, machine):
    sink, stop = open_hub_sink(OUT, hub.create_token("somebody")), threading.Event()
    stop.set()
    with leaving.leaving_on(stop, at_once=True), pytest.raises(leaving.CalledOff):
        named_seal_in(sink, "a")
    assert machine.sealed(["a"]) == set()
    assert machine.waiting() == 0


def test_a_copy_that_is_called_off_leaves_nothing_here(hub, open_hub, open_hub_sink, machine):
    hub.cross_repo = True
    hub.create_repo(IN, files={"a.safetensors": bytes(1000)})
    token, stop = hub.create_token("somebody"), threading.Event()
    source, sink = open_hub(IN, token), open_hub_sink(OUT, token)
    stop.set()
    with leaving.leaving_on(stop, at_once=True), pytest.raises(leaving.CalledOff):
        sink.adopt("a.safetensors", source, "a.safetensors")
    assert machine.sealed(["a.safetensors"]) == set()
    assert not list(machine.scratch.glob("*"))
