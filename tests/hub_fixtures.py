"""Fixtures around the test Hub; `hub` is a running one, empty, for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hub.server import running
from hub.state import Hub

if TYPE_CHECKING:
    from pissa_core.adapters.hub import HubSource

    OpenHub = Callable[..., HubSource]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import close_session

    # A token of the machine's must not reach the test Hub, which would not know it.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with running(Hub()) as served:
        yield served
        close_session()


@pytest.fixture
def open_hub(hub: Hub) -> OpenHub:
    """Return a function that opens a reference on the test Hub, with little patience."""
    # Imported here: every test imports this file, and few need what these need.
    from pissa_core.adapters.hub import HubClient, HubSource, Patience
    from pissa_core.refs import HubRef, parse_ref

    short = Patience(give_up_s=0.4, longest_pause_s=2.5, first_wait_s=0.01, longest_wait_s=0.05)

    def open_source(ref: str, token: str | None = None) -> HubSource:
        parsed = parse_ref(ref)
        assert isinstance(parsed, HubRef)
        client = HubClient(token=token, endpoint=hub.endpoint, opening=short, transfer=short)
        return HubSource(parsed, client=client)

    return open_source
