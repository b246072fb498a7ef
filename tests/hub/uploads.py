"""Large files on their way to the test Hub: hashed as they come, on disk and never in memory."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from hub.blobs import Blob, Gone, Stored


class BadUpload(Exception):
    """What came is not what was announced."""


class Upload:
    """One large file coming in, whole or in parts of `part_size` bytes.

    The checksum runs along with the parts as they come in order; a part that comes again takes it
    up where the part before it ended.
    """

    def __init__(self, repo_id: str, oid: str, size: int, part_size: int, path: Path | None):
        self.repo_id, self.oid, self.size = repo_id, oid, size
        self.part_size = part_size
        self.path = path
        self._hashes = {0: hashlib.sha256()}
        self._sizes: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def parts(self) -> int:
        return -(-self.size // self.part_size)

    def receive(self, number: int, pieces: Iterable[bytes]) -> str:
        """Take in part `number` (from 1) and return its etag."""
        with self._lock:
            before = self._hashes.get(number - 1)
            running = before.copy() if before else None
        own, nbytes = hashlib.sha256(), 0
        start = (number - 1) * self.part_size
        with _opened(self.path) as file:
            file.seek(start)
            for piece in pieces:
                file.write(piece)
                nbytes += len(piece)
                (running or own).update(piece)
        if nbytes != min(self.part_size, self.size - start):
            raise BadUpload(f"part {number} came with {nbytes} bytes")
        with self._lock:
            self._sizes[number] = nbytes
            if running:
                self._hashes[number] = running
            return f'"{(running or own).hexdigest()}"'

    def finish(self, folder: Path) -> Blob:
        """Return the file that all parts make, once it is known to be the one announced."""
        if sum(self._sizes.values()) != self.size:
            raise BadUpload(f"{len(self._sizes)} of {self.parts} parts have come")
        if self._sha256() != self.oid:
            raise BadUpload("the content does not have the checksum that was announced")
        if self.path is None:
            return Gone(self.size, self.oid)
        return Stored(self.path.rename(folder / self.oid), self.size, self.oid)

    def _sha256(self) -> str:
        done = self._hashes.get(self.parts)
        if done is not None and len(self._hashes) == self.parts + 1:
            return done.hexdigest()
        if self.path is None:
            raise BadUpload("parts of a file that is not kept must come in order")
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Uploads:
    """Where large files come in: below `folder`, or nowhere from `swallow_from` bytes on."""

    def __init__(self, folder: Path | None, part_size: int, swallow_from: int | None) -> None:
        self.part_size, self.swallow_from = part_size, swallow_from
        self.finished: Counter[str] = Counter()
        self._open: dict[str, Upload] = {}
        self._lock = threading.Lock()
        self._folder = folder

    @property
    def folder(self) -> Path:
        with self._lock:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="test-hub-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            (self._folder / "incoming").mkdir(parents=True, exist_ok=True)
            return self._folder

    def start(self, repo_id: str, oid: str, size: int) -> str:
        """Prepare for a file and return the name of its upload."""
        name = secrets.token_hex(8)
        kept = self.swallow_from is None or size < self.swallow_from
        path = self.folder / "incoming" / name if kept else None
        self._open[name] = Upload(repo_id, oid, size, self.part_size, path)
        return name

    def __getitem__(self, name: str) -> Upload:
        return self._open[name]

    def finish(self, name: str) -> Blob:
        upload = self._open[name]
        blob = upload.finish(self.folder)
        with self._lock:
            self.finished[upload.oid] += 1
        return blob


def _opened(path: Path | None) -> BinaryIO:
    """Open a file to write into, which may be there; None is one that keeps nothing."""
    if path is None:
        return Path(os.devnull).open("r+b")
    path.touch()
    return path.open("r+b")
