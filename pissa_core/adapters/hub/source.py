"""A model repo on the Hub as a source: pinned to a commit, read by ranges, fetched and checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pissa_core.adapters.disk import disk_errors
from pissa_core.adapters.hub.client import HubClient, HubFile
from pissa_core.errors import DownloadCorrupt, FolderNotFound, ShardTruncated
from pissa_core.openfile import reserve
from pissa_core.ports import ByteRange, FileInfo
from pissa_core.refs import HubRef

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class HubSource:
    """A model repo, or a folder of one, at the commit its revision has when this is opened.

    Nothing goes through the client's cache: what is fetched is on the disk once.
    """

    rereads = False

    def __init__(
        self,
        ref: HubRef,
        *,
        token: str | None = None,
        endpoint: str | None = None,
        client: HubClient | None = None,
    ) -> None:
        """Resolve the revision to a commit and list its files.

        Args:
            ref: the repo, with revision and subfolder.
            token: for this source alone; None uses the process's own.
            endpoint: the Hub's address; None uses the process's own.
            client: used in place of one made from `token` and `endpoint`.

        Raises:
            AccessError: if the repo, the revision or the folder cannot be read.
        """
        self._client = client or HubClient(token=token, endpoint=endpoint)
        pinned = self._client.pin(ref.repo_id, ref.revision)
        self._commit = pinned.commit
        self._ref = HubRef(ref.repo_id, self._commit, ref.subfolder)
        self._asked = ref.revision
        self._prefix = f"{ref.subfolder}/" if ref.subfolder else ""
        self._entries = _below(self._prefix, pinned.files)
        if self._prefix and not self._entries:
            raise FolderNotFound(
                f"{ref.repo_id} has no folder {ref.subfolder!r} at {self._commit[:12]}",
                hint="a reference is hf://org/name[@revision][/subfolder]",
            )
        self._files = {
            path: FileInfo(entry.size, entry.sha256) for path, entry in self._entries.items()
        }

    @property
    def ref(self) -> str:
        """The reference with the commit hash in place of the revision."""
        return str(self._ref)

    @property
    def commit(self) -> str:
        """The commit hash."""
        return self._commit

    @property
    def fingerprint(self) -> str:
        """The commit hash, which stands for every byte of the repo."""
        return self._commit

    @property
    def repo_id(self) -> str:
        """The repo."""
        return self._ref.repo_id

    @property
    def asked(self) -> str | None:
        """The revision that was asked for (None: the default branch), before it was resolved."""
        return self._asked

    @property
    def endpoint(self) -> str:
        """The Hub's address."""
        return self._client.endpoint

    def path_in_repo(self, path: str) -> str:
        """Return where a file lies in the repo, subfolder included."""
        return self._prefix + path

    def files(self) -> Mapping[str, FileInfo]:
        """Every file at the commit, below the subfolder."""
        return self._files

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return a range of a file."""
        size = self._files[path].size
        buffer = bytearray(max(0, (size if stop is None else stop) - start))
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from a file by one ranged request."""
        position = 0
        for chunk in self.stream(path, start, start + len(buffer)):
            buffer[position : position + len(chunk)] = chunk
            position += len(chunk)

    def stream(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield a range of a file as it arrives; what breaks is asked for again from there.

        A range has no checksum of its own: what is held is the commit and the file's size.
        """
        size = self._files[path].size
        if stop > size:
            raise ShardTruncated(
                f"{path}: bytes {start} to {stop} were wanted and the file ends at byte {size}",
                hint="the checkpoint in the repo is incomplete",
            )
        yield from self._client.stream(
            self._ref.repo_id, self._commit, self._prefix + path, start=start, stop=stop, size=size
        )

    def fetch(self, path: str, destination: Path, *, holes: Sequence[ByteRange] = ()) -> bool:
        """Download a file straight to `destination` and check it; holes are downloaded, too.

        A checksum needs every byte, and what lies in the holes is read from the copy.
        """
        try:
            with disk_errors(destination):
                fd = os.open(destination, _NEW_FILE, 0o644)
                with os.fdopen(fd, "wb", buffering=0) as copy:
                    if self._files[path].size:
                        reserve(copy.fileno(), self._files[path].size)
                    self._download(path, copy.fileno())
        except BaseException:
            destination.unlink(missing_ok=True)
            raise
        return True

    def local_root(self) -> None:
        """A Hub repo has no folder here."""
        return

    def _download(self, path: str, fd: int) -> None:
        entry = self._entries[path]
        digest = _digest_for(entry)
        position = 0
        for chunk in self.stream(path, 0, entry.size):
            digest.update(chunk)
            _write(fd, chunk, position)
            position += len(chunk)
        wanted = entry.sha256 or entry.blob_id
        if wanted is not None and digest.hexdigest() != wanted:
            raise DownloadCorrupt(
                f"{path} of {self._ref.repo_id} arrived with the checksum "
                f"{digest.hexdigest()[:16]}… where the Hub promises {wanted[:16]}…",
                hint="run the same again: what is damaged is downloaded anew",
            )


def _below(prefix: str, files: Mapping[str, HubFile]) -> dict[str, HubFile]:
    return {
        path.removeprefix(prefix): files[path] for path in sorted(files) if path.startswith(prefix)
    }


def _digest_for(entry: HubFile) -> hashlib._Hash:
    """Begin the checksum the Hub knows of a file: sha256 of a large one, git's of a small one."""
    if entry.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)


def _write(fd: int, chunk: bytes, position: int) -> None:
    view = memoryview(chunk)
    while view:
        count = os.pwrite(fd, view, position)
        view, position = view[count:], position + count
