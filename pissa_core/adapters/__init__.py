"""Sources and sinks that stand behind the ports, and the doors that choose between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa_core.refs import LocalRef, Ref, resolve_local

if TYPE_CHECKING:
    from pissa_core.adapters.hub import Notice
    from pissa_core.ports import CheckpointSink, CheckpointSource, PublishOptions
    from pissa_core.spec import PissaConfig


def open_source(
    ref: Ref,
    *,
    root: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    patient: bool = False,
    on_wait: Notice | None = None,
) -> CheckpointSource:
    """Open a checkpoint, pinned to the state it has now.

    Args:
        ref: a Hub reference or a local folder.
        root: the folder local references must stay below; None sets no limit.
        token: Hub token for this source alone; None uses the process's own.
        endpoint: the Hub's address; None uses the process's own.
        patient: nobody waits for the answer, so a Hub that asks to wait is waited for.
        on_wait: told of every pause that the Hub makes necessary.

    Raises:
        AccessError: if it cannot be reached.
        OutsideLocalRoot: if a local reference leaves `root`.
    """
    if isinstance(ref, LocalRef):
        from pissa_core.adapters.local import LocalSource

        return LocalSource(resolve_local(ref, root), root=root)
    from pissa_core.adapters.hub import OPENING, PATIENT_OPENING, HubClient, HubSource

    opening = PATIENT_OPENING if patient else OPENING
    client = HubClient(token=token, endpoint=endpoint, opening=opening, on_wait=on_wait)
    return HubSource(ref, client=client)


def open_sink(
    ref: Ref,
    *,
    digest: str,
    root: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    scratch: Path | None = None,
    options: PublishOptions | None = None,
    on_wait: Notice | None = None,
) -> CheckpointSink:
    """Open the place a result goes to; nothing is there before it is staged.

    Args:
        ref: a local folder, or a repo on the Hub, whose revision is the branch.
        digest: names the staging area (see `request_digest`).
        root: the folder local references must stay below; None sets no limit.
        token: Hub token for this sink alone; None uses the process's own.
        endpoint: the Hub's address; None uses the process's own.
        scratch: a folder for work in progress, needed for an output on the Hub.
        options: on what terms a result is shown on the Hub.
        on_wait: told of every pause that the Hub makes necessary.

    Raises:
        OutsideLocalRoot: if a local reference leaves `root`.
    """
    if isinstance(ref, LocalRef):
        from pissa_core.adapters.local import LocalSink

        return LocalSink(resolve_local(ref, root), digest=digest)
    from pissa_core.adapters.hub import HubClient, HubSink

    if scratch is None:
        raise ValueError("an output on the Hub needs a scratch folder")
    client = HubClient(token=token, endpoint=endpoint, on_wait=on_wait)
    return HubSink(ref, digest=digest, scratch=scratch, options=options, client=client)


def staging_digest(
    source: CheckpointSource, config: PissaConfig, output: str, division: str | None = None
) -> str:
    """Name the staging area of a `base-to-pissa` result; see `request_digest`.

    Where shards are divided, how they are (`Plan.division`) is one of the options.
    """
    options = config.model_dump(mode="json") | ({"division": division} if division else {})
    return request_digest("base-to-pissa", [source], options, output)


def folding_digest(
    residual: CheckpointSource, adapter: CheckpointSource, output: str, division: str | None = None
) -> str:
    """Name the staging area of a `pissa-to-base` result; `division` as in `staging_digest`."""
    options = {"division": division} if division else {}
    return request_digest("pissa-to-base", [residual, adapter], options, output)


def request_digest(
    kind: str, sources: Sequence[CheckpointSource], options: Mapping[str, Any], output: str
) -> str:
    """Name the staging area of one result, so that every later attempt at it finds what is done.

    The digest covers the kind of work, the state of every source, the options and the output; a
    second job for the same thing, a resumed one and a command run again all get the same.
    """
    read = [[source.ref, source.fingerprint] for source in sources]
    identity = [kind, read, dict(options), output]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
