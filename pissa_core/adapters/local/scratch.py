"""An attempt's scratch folder: made, adopted from the dead, sealed from, discarded.

A lock in the folder tells the dead from the merely stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from pissa_core.adapters.disk import (
    create_once,
    disk_errors,
    identity_of,
    make_folder,
    sync_folder,
    try_lock,
)
from pissa_core.errors import Cancelled
from pissa_core.ports import Seal

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class LocalAttempt:
    """One attempt's scratch, and where what it finishes goes."""

    folder: Path
    sealed: Path

    def seal(self, record: Seal, shard: Path, part: Path) -> None:
        """Link both files under a token of our own, then write the one record that counts.

        The scratch stays whole until the record is there: a kill in between loses no matrix.
        """
        token = secrets.token_hex(8)
        folder = self.sealed / token
        if not self.sealed.is_dir():
            raise Cancelled(f"the staging area of {record.shard} was discarded meanwhile")
        with disk_errors(self.sealed):
            folder.mkdir()
            os.link(shard, folder / "shard")
            os.link(part, folder / "part")
            sync_folder(folder)
            text = {
                "token": token,
                "shard_identity": identity_of((folder / "shard").stat()),
                "part_identity": identity_of((folder / "part").stat()),
                "seal": asdict(record),
            }
            ours = create_once(self.sealed / "seal.json", json.dumps(text).encode())
        if not ours:
            shutil.rmtree(folder)
        remove_scratch(self.folder)


def open_scratch(work: Path) -> tuple[Path, int]:
    """Take over a dead attempt's scratch below `work`, or make some; return it, and its lock."""
    while True:
        # Others tidy up at any time, and may take a folder in the making for one that was left.
        with suppress(FileNotFoundError):
            make_folder(work)
            opened = adopt(work) or _make_scratch(work)
            if opened is not None:
                return opened


def _make_scratch(work: Path) -> tuple[Path, int] | None:
    """Make a scratch folder that is locked before anybody can adopt it."""
    token = secrets.token_hex(8)
    hidden = work / f".{token}"
    hidden.mkdir()
    lock = try_lock(hidden / "lock")
    if lock is None:
        return None
    try:
        return hidden.rename(work / token), lock
    except OSError:
        os.close(lock)
        raise


def adopt(work: Path) -> tuple[Path, int] | None:
    """Take over the scratch of a dead attempt; remove what further dead attempts left."""
    adopted: tuple[Path, int] | None = None
    for folder in sorted(work.iterdir()):
        if folder.name.startswith("."):  # being made; `discard` clears those that never were
            continue
        lock = _lock_of(folder)
        if lock is None:
            continue
        if adopted is None and (folder / "journal").exists():
            adopted = folder, lock
        else:
            remove_scratch(folder)
            os.close(lock)
    return adopted


def slug(shard: str) -> str:
    """Return a folder name for a shard."""
    # Shards may lie in subfolders; a digest keeps names flat, short and apart.
    readable = os.fsencode(shard.rpartition("/")[2])[:160].decode(errors="ignore")
    return f"{readable}.{hashlib.sha256(os.fsencode(shard)).hexdigest()[:8]}"


def share(folder: Path) -> int:
    """Make a folder for the scratch of several; it cannot be discarded while one shares it."""
    while True:
        make_folder(folder)
        lock = _lock_of(folder, shared=True)
        if lock is not None:
            return lock
        time.sleep(_POLL_S)


def _lock_of(folder: Path, *, shared: bool = False) -> int | None:
    """Lock a scratch folder; None if it is held, or vanished meanwhile."""
    try:
        lock = try_lock(folder / "lock", shared=shared)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if lock is None:
        return None
    try:
        same = os.fstat(lock).st_ino == (folder / "lock").stat().st_ino
    except FileNotFoundError:
        same = False
    if not same:
        os.close(lock)
        return None
    return lock


def discard_scratch(folder: Path) -> bool:
    """Remove a dead attempt's scratch, or a file it held; say whether a live one still does."""
    if folder.is_file():
        return _discard_file(folder)
    lock = _lock_of(folder)
    if lock is None:
        return folder.exists()
    remove_scratch(folder)
    os.close(lock)
    return False


def _discard_file(path: Path) -> bool:
    try:
        lock = try_lock(path)
    except FileNotFoundError:  # others tidy up, too
        return False
    if lock is None:
        return True
    path.unlink(missing_ok=True)
    os.close(lock)
    return False


def discard_result(folder: Path) -> None:
    """Remove what dead attempts left of one result, below ``folder/SHARD/``."""
    for work in _inside(folder):
        for scratch in _inside(work):
            discard_scratch(scratch)
        remove_if_empty(work)
    remove_if_empty(folder)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # others tidy up, too
        return []


def below(root: Path, depth: int) -> list[Path]:
    """List what lies so many levels below a folder, sorted, while others may remove any of it."""
    found = [root]
    for _ in range(depth):
        found = [path for folder in found for path in _inside(folder)]
    return found


def remove_if_empty(*folders: Path) -> None:
    """Remove folders, each if nothing is in it."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def discard_old(root: Path, age: timedelta) -> None:
    """Remove scratch that dead attempts left below ``root/RESULT/SHARD/`` and nobody takes up."""
    oldest = time.time() - age.total_seconds()
    for path in below(root, 3):
        with suppress(FileNotFoundError):  # another attempt does the same
            if _last_written(path) < oldest:
                discard_scratch(path)


def _last_written(path: Path) -> float:
    paths = [path, *path.iterdir()] if path.is_dir() else [path]
    return max(each.stat().st_mtime for each in paths)


def remove_scratch(folder: Path) -> None:
    """Remove a scratch folder that we hold."""
    # Hidden first: once its lock is unlinked, another attempt would find a folder to adopt.
    with suppress(OSError):
        hidden = folder.rename(folder.with_name(f".{folder.name}"))
        shutil.rmtree(hidden, ignore_errors=True)
