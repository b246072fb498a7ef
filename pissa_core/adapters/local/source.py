"""A local folder as a source, pinned by the sizes and times its files have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pissa_core.adapters.disk import disk_errors, identity_of, private_copy
from pissa_core.errors import (
    FolderNotFound,
    NoReadAccess,
    OutsideLocalRoot,
    ShardTruncated,
    SourceChanged,
)
from pissa_core.ports import ByteRange, FileInfo
from pissa_core.tensorfile import read_into_fd


class LocalSource:
    """A folder, pinned by the sizes and modification times its files have when it is opened."""

    commit = None
    rereads = True

    def __init__(self, folder: Path, *, root: Path | None = None) -> None:
        """List `folder`; with `root`, refuse files whose symlinks leave it."""
        if not folder.is_dir():
            kind = "is a file, not a folder" if folder.exists() else "does not exist"
            raise FolderNotFound(
                f"the folder {folder} {kind}",
                hint="a model on the Hub is written org/name or hf://org/name",
            )
        self._folder = folder
        self._stats = {path: identity_of((folder / path).stat()) for path in _walk(folder)}
        if root is not None:
            self._refuse_escapes(root.resolve())

    @property
    def ref(self) -> str:
        """The folder's absolute path."""
        return str(self._folder)

    @property
    def fingerprint(self) -> str:
        """Digest of every file's path, size and modification time."""
        return hashlib.sha256(repr(sorted(self._stats.items())).encode()).hexdigest()

    def files(self) -> Mapping[str, FileInfo]:
        """Every file below the folder."""
        return {path: FileInfo(identity[0]) for path, identity in self._stats.items()}

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return a range of a file."""
        size = self._stats[path][0]
        buffer = bytearray(max(0, (size if stop is None else stop) - start))
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from a file."""
        with self._opened(path) as fd:
            try:
                read_into_fd(fd, start, buffer)
            except EOFError as error:
                raise ShardTruncated(
                    f"{path}: bytes {start} to {start + len(buffer)} were wanted and {error}",
                    hint="download or save the checkpoint again",
                ) from error

    def fetch(self, path: str, destination: Path, *, holes: Sequence[ByteRange] = ()) -> None:
        """Make a private copy: a reflink where the disk can, else only what lies outside holes."""
        with self._opened(path) as fd, disk_errors(destination):
            private_copy(fd, destination, holes)

    def local_root(self) -> Path:
        """The folder itself."""
        return self._folder

    @contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        try:
            fd = os.open(self._folder / path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise SourceChanged(f"{path} has gone since {self._folder} was opened") from error
        except PermissionError as error:
            raise NoReadAccess(f"{self._folder / path} may not be read") from error
        try:
            if identity_of(os.fstat(fd)) != self._stats[path]:
                raise SourceChanged(
                    f"{path} in {self._folder} was changed while it was being read",
                    hint="run again once nothing writes to the checkpoint any more",
                )
            yield fd
        finally:
            os.close(fd)

    def _refuse_escapes(self, root: Path) -> None:
        for path in self._stats:
            real = Path(os.path.realpath(self._folder / path))
            if root not in real.parents:
                raise OutsideLocalRoot(
                    f"{path} is a symlink that leaves the folder this service may touch",
                    hint="copy the file to where the symlink is",
                )


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file():
                yield PurePosixPath(path.relative_to(folder)).as_posix()
