"""Seals that wait for a commit, so that one commit carries those of all attempts on a machine.

Attempts are threads and processes that share the result's scratch folder. One whose files are
sent leaves a record here; whoever's turn it is commits every record there is::

    scratch/DIGEST/.sealing/
      lock           held by the one who commits, and touched by it all the while
      TOKEN.ready    one seal, locked by its attempt, and touched by it while it waits

A record counts while its attempt is alive: the record of one that was killed goes, and one that
is stopped is passed over, since its shard may be another's by the time it wakes up. Nor does a
stopped holder of the lock hold up anybody. The lock saves commits and keeps nothing right: of two
who commit at once, both naming the same parent, one has to look again.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy

from pissa_core import leaving
from pissa_core.adapters.disk import make_folder, try_lock
from pissa_core.adapters.hub.client import HubFile
from pissa_core.adapters.hub.uploading import sent_addition

_SCHEMA = 1  # processes of two versions may meet while a machine is brought up to date
_POLL_S = 0.05
_BEAT_S = 1.0
# One who has not stirred for so long may be stopped. It is less than a lease, else the seal of one
# whose shard is another's may go along; of the two, one counts all the same.
_ALIVE_S = 10.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A seal to be committed, whose large files are on the Hub.

    Attributes:
        shard: what it seals.
        operations: additions sent ahead, and copies from the source's repo.
        wanted: what each path holds afterwards.
    """

    shard: str
    operations: tuple[CommitOperationAdd | CommitOperationCopy, ...]
    wanted: Mapping[str, HubFile]

    def as_json(self) -> bytes:
        """Write it down for another process to commit."""
        text = {
            "schema": _SCHEMA,
            "shard": self.shard,
            "operations": [_written(operation) for operation in self.operations],
            "wanted": {path: asdict(file) for path, file in self.wanted.items()},
        }
        return json.dumps(text).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Ready:
        """Read what `as_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: if another version wrote it.
        """
        read = json.loads(text)
        if read["schema"] != _SCHEMA:
            raise ValueError(f"a record of schema {read['schema']}, not {_SCHEMA}")
        wanted = {path: HubFile(**file) for path, file in read["wanted"].items()}
        return cls(read["shard"], tuple(_operation(each) for each in read["operations"]), wanted)


class Pending:
    """The seals of one result that wait on this machine."""

    def __init__(self, folder: Path) -> None:
        """Use a folder that is made when the first seal waits, and goes with the last."""
        self._folder = folder

    @contextmanager
    def joined(self, ready: Ready) -> Iterator[Path | None]:
        """Have a seal wait with the others while the block is open.

        It gives the record; None where there is no room for one, so that the seal goes alone.
        """
        left = self._try_leave_record(ready.as_json())
        if left is None:
            self.tidy()
            yield None
            return
        record, lock = left
        try:
            yield record
        finally:
            record.unlink(missing_ok=True)
            os.close(lock)
            self.tidy()

    @contextmanager
    def turn(self, record: Path | None) -> Iterator[None]:
        """Wait until nobody else on this machine commits, or whoever does is stopped.

        Where there is no record, or no room for a lock, nobody is waited for.
        """
        lock = None if record is None else self._entered(record)
        if lock is None:
            yield
            return
        done = threading.Event()
        beat = threading.Thread(target=_beat, args=(lock, done), daemon=True)
        beat.start()
        try:
            yield
        finally:
            done.set()
            beat.join()
            os.close(lock)

    def beside(self, record: Path | None) -> list[Ready]:
        """Return what else may be committed, in the order of shards; nothing without a record."""
        if record is None:
            return []
        others = [path for path in self._folder.glob("*.ready") if path != record]
        found = [_read_living(path) for path in others]
        return sorted((ready for ready in found if ready is not None), key=lambda r: r.shard)

    def tidy(self) -> None:
        """Remove what the dead left, and the folder once nobody waits there."""
        with suppress(OSError):  # others tidy up, too
            for path in self._folder.iterdir():
                if path.suffix == ".ready" or _was_in_the_making(path):
                    _read_living(path)
            if not [path for path in self._folder.iterdir() if path.name != "lock"]:
                (self._folder / "lock").unlink(missing_ok=True)
                self._folder.rmdir()

    def _try_leave_record(self, text: bytes) -> tuple[Path, int] | None:
        """Leave a record; None where it cannot be written, for which no seal should fail."""
        try:
            return self._leave_record(text)
        except OSError:
            return None

    def _leave_record(self, text: bytes) -> tuple[Path, int]:
        """Leave a record; return it, and its lock."""
        while True:
            # Others tidy up at any time, and may take a record in the making for one that was left.
            with suppress(FileNotFoundError):
                make_folder(self._folder)
                left = self._make_record(text)
                if left is not None:
                    return left

    def _make_record(self, text: bytes) -> tuple[Path, int] | None:
        """Write a record that is locked before anybody can see it."""
        hidden = self._folder / f".{secrets.token_hex(8)}"
        lock = try_lock(hidden)
        if lock is None:
            return None
        try:
            # Not by its name: that may be gone by now, and a new file would be nobody's.
            with open(lock, "wb", closefd=False) as file:
                file.write(text)
            return hidden.rename(self._folder / f"{hidden.name[1:]}.ready"), lock
        except BaseException:
            hidden.unlink(missing_ok=True)
            os.close(lock)
            raise

    def _entered(self, record: Path) -> int | None:
        """Return the lock once it is ours; None if its holder does not stir, or without room."""
        path = self._folder / "lock"
        while True:
            try:
                lock = try_lock(path)
            except OSError:
                return None
            if lock is not None:
                os.utime(lock)
                return lock
            with suppress(FileNotFoundError):
                if _stirred_s(path) > _ALIVE_S:
                    return None
            leaving.sleep(_POLL_S)
            os.utime(record)


def _read_living(path: Path) -> Ready | None:
    """Read a record whose attempt is alive; remove one whose attempt is dead."""
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if _is_free(fd):
                path.unlink()
            elif _stirred_s(path) <= _ALIVE_S:
                # Of another version: no business of ours.
                with suppress(ValueError, TypeError, KeyError):
                    return Ready.from_json(file.read())
    return None


def _was_in_the_making(path: Path) -> bool:
    return path.name.startswith(".") and _stirred_s(path) > _ALIVE_S


def _is_free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stirred_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _beat(lock: int, done: threading.Event) -> None:
    while not done.wait(_BEAT_S):
        os.utime(lock)


def _written(operation: CommitOperationAdd | CommitOperationCopy) -> dict[str, Any]:
    if isinstance(operation, CommitOperationCopy):
        return {
            "copy": {
                "src_path_in_repo": operation.src_path_in_repo,
                "path_in_repo": operation.path_in_repo,
                "src_revision": operation.src_revision,
                "src_repo_id": operation.src_repo_id,
                "src_repo_type": operation.src_repo_type,
            }
        }
    info, in_git = operation.upload_info, operation._upload_mode == "regular"
    return {
        "path": operation.path_in_repo,
        "sha256": info.sha256.hex(),
        "size": info.size,
        "content": operation.b64content().decode() if in_git else None,
    }


def _operation(written: Mapping[str, Any]) -> CommitOperationAdd | CommitOperationCopy:
    if "copy" in written:
        return CommitOperationCopy(**written["copy"])
    content = written["content"]
    return sent_addition(
        written["path"],
        sha256=written["sha256"],
        size=written["size"],
        content=None if content is None else base64.b64decode(content),
    )
