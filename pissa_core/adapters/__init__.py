"""Sources and sinks that stand behind the ports, and the doors that choose between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa_core.errors import InvalidReference
from pissa_core.refs import LocalRef, Ref, resolve_local

if TYPE_CHECKING:
    from pissa_core.ports import CheckpointSink, CheckpointSource
    from pissa_core.spec import PissaConfig


def open_source(
    ref: Ref, *, root: Path | None = None, token: str | None = None, endpoint: str | None = None
) -> CheckpointSource:
    """Open a checkpoint, pinned to the state it has now.

    Args:
        ref: a Hub reference or a local folder.
        root: the folder local references must stay below; None sets no limit.
        token: Hub token for this source alone; None uses the process's own.
        endpoint: the Hub's address; None uses the process's own.

    Raises:
        AccessError: if it cannot be reached.
        OutsideLocalRoot: if a local reference leaves `root`.
    """
    if isinstance(ref, LocalRef):
        from pissa_core.adapters.local import LocalSource

        return LocalSource(resolve_local(ref, root), root=root)
    from pissa_core.adapters.hub import HubSource

    return HubSource(ref, token=token, endpoint=endpoint)


def open_sink(ref: Ref, *, digest: str, root: Path | None = None) -> CheckpointSink:
    """Open the place a result goes to; `digest` (see `staging_digest`) names its staging area."""
    if not isinstance(ref, LocalRef):
        raise InvalidReference(
            f"{ref} is on the Hub, and publishing there is not supported yet",
            hint="give a local folder as the output and upload it with `hf upload`",
        )
    from pissa_core.adapters.local import LocalSink

    return LocalSink(resolve_local(ref, root), digest=digest)


def staging_digest(
    source: CheckpointSource, config: PissaConfig, output: str, division: str | None = None
) -> str:
    """Name the staging area of a `base-to-pissa` result; see `request_digest`.

    Where shards are divided, how they are (`Plan.division`) is one of the options.
    """
    options = config.model_dump(mode="json") | ({"division": division} if division else {})
    return request_digest("base-to-pissa", [source], options, output)


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
