"""Fixtures around the test Hub; `hub` is a running one, empty, for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hub.server import running
from hub.state import Hub

if TYPE_CHECKING:
    from pissa_core.adapters.hub import HubSink, HubSource, Notice, Patience
    from pissa_core.adapters.hub.pacing import Pace

    OpenHub = Callable[..., HubSource]
    OpenHubSink = Callable[..., HubSink]


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
    from pissa_core.adapters.hub import HubClient, HubSource
    from pissa_core.refs import HubRef, parse_ref

    short = short_patience()

    def open_source(ref: str, token: str | None = None) -> HubSource:
        parsed = parse_ref(ref)
        assert isinstance(parsed, HubRef)
        client = HubClient(token=token, endpoint=hub.endpoint, opening=short, transfer=short)
        return HubSource(parsed, client=client)

    return open_source


def short_patience() -> Patience:
    from pissa_core.adapters.hub import Patience

    # Two faults in a row are outlived on a busy machine, too: so many tries whatever they take.
    return Patience(
        give_up_s=0.4, longest_pause_s=2.5, first_wait_s=0.01, longest_wait_s=0.05, tries=3
    )


@pytest.fixture
def open_hub_sink(hub: Hub, tmp_path: Path) -> OpenHubSink:
    """Return a function that opens a sink on the test Hub, with little patience.

    `machine` names the folder that its scratch lies in: another one is another machine.
    """
    from pissa_core.adapters.hub import HubClient, HubSink
    from pissa_core.adapters.hub.writer import HubWriter, Patiences
    from pissa_core.ports import PublishOptions
    from pissa_core.refs import HubRef, parse_ref

    short = short_patience()

    def open_sink(
        ref: str,
        token: str | None,
        digest: str = "d1",
        machine: str = "here",
        on_wait: Notice | None = None,
        pace: Pace | None = None,
        **options: Any,
    ) -> HubSink:
        parsed = parse_ref(ref)
        assert isinstance(parsed, HubRef)
        client = HubClient(
            token=token, endpoint=hub.endpoint, opening=short, transfer=short, on_wait=on_wait
        )
        return HubSink(
            parsed,
            digest=digest,
            scratch=tmp_path / machine,
            options=PublishOptions(**options),
            writer=HubWriter(client, parsed.repo_id, patiences=Patiences(short, short)),
            pace=pace,
        )

    return open_sink
