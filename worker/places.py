"""Where a job reads and writes, which storage that needs, and which queues follow from it.

A storage is a folder with a random id in it. Work on local folders goes only to workers that
find the same id in theirs; the queue's name says which ids are needed::

    plan  work                   any worker
    work.D                       a worker that shares the data folder D (kept files)
    work.D+R                     one that shares the data folder and the local root R

Torch-free: the API and the workers agree on this without loading the engine.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from pissa_core.refs import LocalRef, Ref, parse_output, parse_ref, resolve_local
from worker.contract import JobRequest, WithOutput
from worker.settings import Settings
from worker.terms import SOURCE_FIELDS
from worker.vault import read_or_create

ID_FILE = ".pissa-storage-id"


@dataclass(frozen=True, slots=True)
class Storages:
    """The ids of the storages this process shares."""

    data: str
    root: str | None = None

    @property
    def queues(self) -> tuple[str, ...]:
        """Suffixes of every queue that a worker with these storages can serve."""
        ids = sorted({self.data, *([self.root] if self.root else [])})
        subsets = [chosen for size in range(len(ids) + 1) for chosen in combinations(ids, size)]
        return tuple(_suffix(subset) for subset in subsets)


def storages(settings: Settings) -> Storages:
    """Read the ids of the data folder and the local root, making them where there are none."""
    root = settings.local_root
    return Storages(_storage_id(settings.data_dir), None if root is None else _storage_id(root))


def queue_names(request: JobRequest, shared: Storages) -> tuple[str, str]:
    """Return the queue for the planner's part of a job, and the one for all its other work."""
    needed = set()
    if any(isinstance(ref, LocalRef) for ref in references(request)) and shared.root:
        needed.add(shared.root)
    if isinstance(request, WithOutput) and request.output is None:
        needed.add(shared.data)
    suffix = _suffix(tuple(sorted(needed)))
    return f"plan{suffix}", f"work{suffix}"


def references(request: JobRequest) -> Iterator[Ref]:
    """Yield every reference of a request, output included."""
    for field in SOURCE_FIELDS:
        text = getattr(request, field, None)
        if text is not None:
            yield parse_ref(text)
    output = getattr(request, "output", None)
    if output is not None:
        yield parse_ref(output.ref)


def output_ref(request: WithOutput, job_id: str, settings: Settings) -> tuple[Ref, Path | None]:
    """Return where the result goes, and the root that bounds it (None: our own folder, or a Hub).

    Kept files lie in the data folder, under the job's id.
    """
    if request.output is None:
        return LocalRef(str(settings.files_dir / job_id)), None
    ref = parse_output(request.output.ref, request.output.branch)
    if isinstance(ref, LocalRef):
        return LocalRef(str(resolve_local(ref, settings.local_root))), settings.local_root
    return ref, None


def _storage_id(folder: Path) -> str:
    try:
        return read_or_create(folder / ID_FILE, secrets.token_hex(8)).strip()
    except OSError:
        # A read-only folder without an id can only be a source: its path stands for it, and the
        # operator who mounts it elsewhere under the same path says that it is the same.
        return "path-" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def _suffix(ids: tuple[str, ...]) -> str:
    return f".{'+'.join(ids)}" if ids else ""
