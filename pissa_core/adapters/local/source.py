"""A local folder as a source, pinned by the sizes and times its files have."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from pissa_core.adapters.disk import disk_errors, identity_of, private_copy
from pissa_core.errors import (
    FolderNotFound,
    NoReadAccess,
    OutsideLocalRoot,
    ShardTruncated,
    SourceChanged,
)
from pissa_core.openfile import CHUNK, read_into_fd
from pissa_core.ports import ByteRange, FileInfo

_HINT = "a model on the Hub is written org/name or hf://org/name"


class LocalSource:
    """A folder, pinned by the sizes and modification times its files have when it is opened."""

    commit = None
    rereads = True

    def __init__(self, folder: Path, *, root: Path | None = None) -> None:
        """List `folder`; with `root`, refuse files whose symlinks leave it."""
        self._folder = folder
        with _access_errors(folder):
            _check_folder(folder)
            self._stats = dict(_walk(folder))
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

    def stream(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield a range of a file in chunks."""
        for begin in range(start, stop, CHUNK):
            yield self.read(path, begin, min(begin + CHUNK, stop))

    def fetch(self, path: str, destination: Path, *, holes: Sequence[ByteRange] = ()) -> bool:
        """Make a private copy: a reflink where the disk can, else only what lies outside holes."""
        with self._opened(path) as fd, disk_errors(destination):
            try:
                return private_copy(fd, destination, holes)
            except EOFError as error:
                raise self._changed(path) from error

    def local_root(self) -> Path:
        """The folder itself."""
        return self._folder

    @contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Open a file; what is read from it counts only if the file is as pinned to the end."""
        try:
            with _access_errors(self._folder / path):
                fd = os.open(self._folder / path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise SourceChanged(f"{path} has gone since {self._folder} was opened") from error
        try:
            self._check_pinned(path, fd)
            yield fd
            self._check_pinned(path, fd)
        finally:
            os.close(fd)

    def _check_pinned(self, path: str, fd: int) -> None:
        if identity_of(os.fstat(fd)) != self._stats[path]:
            raise self._changed(path)

    def _changed(self, path: str) -> SourceChanged:
        return SourceChanged(
            f"{path} in {self._folder} was changed while it was being read",
            hint="run again once nothing writes to the checkpoint any more",
        )

    def _refuse_escapes(self, root: Path) -> None:
        for path in self._stats:
            real = Path(os.path.realpath(self._folder / path))
            if root not in real.parents:
                raise OutsideLocalRoot(
                    f"{path} is a symlink that leaves the folder this service may touch",
                    hint="copy the file to where the symlink is",
                )


@contextmanager
def _access_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise NoReadAccess(
            f"{error.filename or path} may not be read",
            hint="ask its owner for permission, or copy the model to a folder of your own",
        ) from error


def _check_folder(folder: Path) -> None:
    try:
        mode = folder.stat().st_mode
    except PermissionError:
        raise
    except OSError as error:
        what = (error.strerror or "it cannot be opened").lower()
        raise FolderNotFound(f"the folder {folder} does not exist ({what})", hint=_HINT) from error
    if not stat.S_ISDIR(mode):
        raise FolderNotFound(f"the folder {folder} is a file, not a folder", hint=_HINT)


def _walk(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file():
                with suppress(FileNotFoundError):  # gone since the folder was listed
                    identity = identity_of(path.stat())
                    yield PurePosixPath(path.relative_to(folder)).as_posix(), identity


def _raise(error: OSError) -> None:
    raise error
