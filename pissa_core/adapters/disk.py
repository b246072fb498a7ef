"""What every adapter needs from a disk: private copies, checksums, durable small files, locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pissa_core.errors import DiskFull, NoWriteAccess
from pissa_core.openfile import CHUNK, reserve
from pissa_core.ports import ByteRange, FileInfo

_FICLONE = 0x40049409
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk and a forbidden write into our errors, naming `where`; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"the disk of {where} is full",
                hint="free some space and run the same again: it resumes",
            ) from error
        if error.errno in _FORBIDDEN:
            raise NoWriteAccess(
                f"{where} cannot be written ({error.strerror})",
                hint="choose a folder you may write to",
            ) from error
        raise


def private_copy(source_fd: int, destination: Path, holes: Sequence[ByteRange] = ()) -> bool:
    """Copy an open file to a new one of its own: a reflink where the disk can, else bytes.

    Ranges in `holes` are reserved and not copied, since the caller will write them; returned is
    whether they came along all the same, as in a reflink.
    """
    size = os.fstat(source_fd).st_size
    with destination.open("wb") as copy:
        if _clone(source_fd, copy.fileno()):
            return True
        if size:
            reserve(copy.fileno(), size)
        for start, stop in outside(holes, size):
            _copy_range(source_fd, copy.fileno(), start, stop)
    return False


def outside(holes: Sequence[ByteRange], size: int) -> Iterator[ByteRange]:
    """Yield what of ``[0, size)`` lies outside the holes, in order."""
    position = 0
    for start, stop in sorted(holes):
        if start > position:
            yield position, start
        position = max(position, stop)
    if position < size:
        yield position, size


def _clone(source_fd: int, copy_fd: int) -> bool:
    try:
        fcntl.ioctl(copy_fd, _FICLONE, source_fd)
    except OSError:  # each file system and sandbox says no in its own way
        return False
    return True


def _copy_range(source_fd: int, copy_fd: int, start: int, stop: int) -> None:
    while start < stop:
        count = _copy_some(source_fd, copy_fd, start, min(stop - start, 1 << 30))
        if count == 0:
            raise EOFError(f"the file ends at byte {start}")
        start += count


def _copy_some(source_fd: int, copy_fd: int, start: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        with suppress(OSError):
            copied = os.copy_file_range(source_fd, copy_fd, count, start, start)
            if copied:  # some network disks answer 0 for "not here", too
                return copied
    data = os.pread(source_fd, min(count, CHUNK), start)
    return os.pwrite(copy_fd, data, start)


def file_info(path: Path) -> FileInfo:
    """Return size and sha256 of a file, read in chunks."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileInfo(file.tell(), digest.hexdigest())


def write_stream(path: Path, chunks: Iterable[bytes]) -> FileInfo:
    """Write a new file from chunks, synced; return its size and sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(size, digest.hexdigest())


def create_once(path: Path, content: bytes) -> bool:
    """Create a file with its whole content, durably, unless it is there; say whether we did."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_stream(temporary, [content])
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def replace_file(path: Path, content: bytes) -> None:
    """Put a file with its whole content in the place of what is there, durably."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_stream(temporary, [content])
    temporary.rename(path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, durably."""
    while not folder.is_dir():
        make_folder(folder.parent)
        with suppress(FileNotFoundError):  # another removed the one above, as it was empty
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def allocated(folder: Path) -> int:
    """Count the bytes of disk below a folder; a file with several names counts once."""
    blocks = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            with suppress(FileNotFoundError):  # moved or removed by another while we count
                stat = Path(parent, name).lstat()
                blocks[stat.st_ino] = stat.st_blocks
    return 512 * sum(blocks.values())


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """Lock a file for this process's life; None if a living process holds it.

    Several may share a lock, which then is nobody's alone.

    The kernel frees the lock when its holder dies and keeps it while the holder is merely
    stopped: exactly the difference between scratch that may be adopted and scratch that may not.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return fd


def identity_of(stat: os.stat_result) -> tuple[int, ...]:
    """Return what stays the same while nobody writes a file: size, modification time, inode."""
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)
