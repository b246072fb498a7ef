"""A local folder as a sink: it appears, complete, by one rename.

Everything is staged beside it, on the same disk::

    .NAME.pissa-staging-DIGEST/
      work/<shard>/<token>/      an attempt's scratch: lock, private copy, part, journal
      sealed/<shard>/<token>/    shard and part of the attempt that sealed
      sealed/<shard>/seal.json   which attempt that was, with checksums; made once
      tree-<token>/              the output, put together from hard links
      tree-<token>.lock          held while it is being put together
      published.json             checksum of the manifest about to become visible
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pissa_core.adapters.disk import (
    allocated,
    disk_errors,
    file_info,
    identity_of,
    make_folder,
    nearest_existing,
    replace_file,
    sync_folder,
    try_lock,
    write_stream,
)
from pissa_core.adapters.local.scratch import (
    LocalAttempt,
    below,
    discard_scratch,
    open_scratch,
    slug,
)
from pissa_core.errors import (
    Cancelled,
    NoWriteAccess,
    OutputExists,
    OutputInsideSource,
    OutputIsSource,
)
from pissa_core.ports import Attempt, CheckpointSource, FileInfo, Publication, Seal


class LocalSink:
    """A folder that appears, complete, by one rename."""

    revision = None
    publishing_folder = None

    def __init__(self, folder: Path, *, digest: str) -> None:
        """Aim at `folder`; `digest` names the staging area beside it."""
        self._folder = folder
        # A name may have 255 bytes; the digest tells apart what is cut off here.
        name = os.fsencode(folder.name)[:160].decode(errors="ignore")
        self._staging = folder.parent / f".{name}.pissa-staging-{digest}"

    @property
    def ref(self) -> str:
        """The folder's absolute path."""
        return str(self._folder)

    @property
    def base_model_name_or_path(self) -> str:
        """The folder's absolute path."""
        return str(self._folder)

    def check(self, source: CheckpointSource) -> None:
        """Refuse a folder that holds something, is the source, or lies inside it."""
        root = source.local_root()
        if root is not None and root == self._folder:
            raise OutputIsSource(
                f"output and source are the same folder, {self._folder}",
                hint="name another folder; the source is never changed",
            )
        if root is not None and root in self._folder.parents:
            raise OutputInsideSource(
                f"the output {self._folder} lies inside the source {root}",
                hint="name a folder outside the source",
            )
        with disk_errors(self._folder):
            if self._occupied() and self.published() is None:
                raise OutputExists(
                    f"{self._folder} exists and is not empty",
                    hint="name another folder, or remove this one first",
                )
            self._check_writable()

    @property
    def scratch_folder(self) -> Path:
        """Below the staging area."""
        return self._staging / "work"

    def complaint_about(self, card: str) -> None:
        """Never any: nobody reads a card here."""

    def free_bytes(self) -> int:
        """Free bytes of the disk that staging and output lie on, and what staging has already."""
        free = shutil.disk_usage(nearest_existing(self._folder.parent)).free
        return free + allocated(self._staging)

    def seal_of(self, shard: str) -> Seal | None:
        """Read a shard's seal and check both files: unchanged since sealed, or checksums right."""
        record_path = self._sealed(shard) / "seal.json"
        try:
            record = json.loads(record_path.read_bytes())
        except FileNotFoundError:
            return None
        seal = Seal(**{**record["seal"], "rows": tuple(record["seal"]["rows"])})
        folder = self._sealed(shard) / record["token"]
        if self._intact(folder / "shard", record["shard_identity"], seal.size, seal.sha256) and (
            self._intact(folder / "part", record["part_identity"], seal.part_size, seal.part_sha256)
        ):
            return seal
        record_path.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def seals_of(self, shards: Sequence[str]) -> tuple[Seal | None, ...]:
        """Return the seals of several shards."""
        return tuple(self.seal_of(shard) for shard in shards)

    def adopt(self, shard: str, source: CheckpointSource, path: str) -> None:
        """Never: every byte of a result comes here."""

    @contextmanager
    def attempt(self, shard: str) -> Iterator[Attempt]:
        """Open scratch of our own, taking over what a dead attempt left."""
        work = self._staging / "work" / slug(shard)
        with disk_errors(self._folder):
            make_folder(self._sealed(shard))
            folder, lock = open_scratch(work)
        try:
            yield LocalAttempt(folder, self._sealed(shard))
        finally:
            discarded = self._discarded()
            if discarded:  # under us: leave nothing
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            if discarded:
                self.discard()

    def read_part(self, shard: str, start: int, stop: int) -> bytes:
        """Return a range of a sealed part."""
        record = json.loads((self._sealed(shard) / "seal.json").read_bytes())
        with (self._sealed(shard) / record["token"] / "part").open("rb") as part:
            part.seek(start)
            content: bytes = part.read(stop - start)
            return content

    def published(self) -> bytes | None:
        """Return the marker of a result that an earlier attempt renamed into place."""
        try:
            announced = json.loads((self._staging / "published.json").read_bytes())
            content: bytes = (self._folder / announced["path"]).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        ours = hashlib.sha256(content).hexdigest() == announced["sha256"]
        return content if ours else None

    def publish(self, contents: Publication) -> None:
        """Put the tree together from hard links, then rename it into place."""
        if self.published() is not None:
            return
        with disk_errors(self._folder), self._tree() as tree:
            try:
                self._build(tree, contents)
            except FileNotFoundError as error:
                self._refuse_discarded(error)
                raise
            _sync_tree(tree)
            self._refuse_discarded()
            self._announce(tree, contents.marker)
            self._make_visible(tree)

    def discard(self, *, keep_sealed: bool = False) -> None:
        """Remove what is staged, except scratch that a live attempt holds."""
        work = self._staging / "work"
        held = [discard_scratch(folder) for folder in below(work, 2)]
        if not any(held):
            shutil.rmtree(work, ignore_errors=True)
        self._discard_trees()
        sealed = self._staging / "sealed"
        if keep_sealed and any(sealed.glob("*/seal.json")):
            return
        shutil.rmtree(sealed, ignore_errors=True)
        with suppress(FileNotFoundError):
            (self._staging / "published.json").unlink()
        with suppress(OSError):
            self._staging.rmdir()

    def _sealed(self, shard: str) -> Path:
        return self._staging / "sealed" / slug(shard)

    def _intact(self, path: Path, identity: list[int], size: int, sha256: str) -> bool:
        # A file that was synced before its seal was written and still has the same inode, size
        # and modification time holds the same bytes; only any other is read again.
        if not path.is_file():
            return False
        return identity_of(path.stat()) == tuple(identity) or file_info(path) == FileInfo(
            size, sha256
        )

    def _occupied(self) -> bool:
        if self._folder.is_dir():
            return any(self._folder.iterdir())
        return os.path.lexists(self._folder)

    def _check_writable(self) -> None:
        if self._folder.is_mount():
            raise NoWriteAccess(
                f"{self._folder} is a mount point, which no rename can put a result in place of",
                hint=f"name a folder inside it: {self._folder / 'model'}",
            )
        parent = nearest_existing(self._folder.parent)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise NoWriteAccess(
                f"nothing can be written in {parent}", hint="choose a folder you may write to"
            )

    def _discarded(self) -> bool:
        return not (self._staging / "sealed").is_dir()

    def _refuse_discarded(self, cause: Exception | None = None) -> None:
        if self._discarded():
            raise Cancelled(f"the staging area of {self._folder} was discarded") from cause

    @contextmanager
    def _tree(self) -> Iterator[Path]:
        """Make a folder to put the output together in; whatever is left of it goes at the end."""
        self._discard_trees()
        tree = self._staging / f"tree-{secrets.token_hex(8)}"
        make_folder(self._staging)
        lock = try_lock(tree.with_suffix(".lock"))
        try:
            tree.mkdir()
            yield tree
        finally:
            shutil.rmtree(tree, ignore_errors=True)
            tree.with_suffix(".lock").unlink(missing_ok=True)
            if lock is not None:
                os.close(lock)
            if self._discarded():
                self.discard()

    def _discard_trees(self) -> None:
        """Remove what publishing attempts left that are dead by now."""
        for path in sorted(self._staging.glob("tree-*.lock")):
            lock = try_lock(path)
            if lock is not None:
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)
                os.close(lock)

    def _build(self, tree: Path, contents: Publication) -> None:
        files: dict[str, FileInfo] = {}
        for seal in contents.shards:
            self._link_shard(seal.shard, tree / seal.shard)
            files[seal.shard] = FileInfo(seal.size, seal.sha256)
        for path in contents.copies:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            contents.source.fetch(path, tree / path)
            files[path] = file_info(tree / path)
        for path, chunks in contents.streams.items():
            files[path] = write_stream(tree / path, chunks())
        for path, content in contents.closing(files).items():
            write_stream(tree / path, [content])

    def _link_shard(self, shard: str, destination: Path) -> None:
        record = json.loads((self._sealed(shard) / "seal.json").read_bytes())
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.link(self._sealed(shard) / record["token"] / "shard", destination)

    def _announce(self, tree: Path, marker: str) -> None:
        # Written before the rename: a run killed right after it can tell its own result from
        # somebody else's folder.
        text = {"path": marker, "sha256": file_info(tree / marker).sha256}
        replace_file(self._staging / "published.json", json.dumps(text).encode())

    def _make_visible(self, tree: Path) -> None:
        try:
            tree.rename(self._folder)
        except OSError as error:
            if not self._occupied():
                raise
            if self.published() is not None:  # by another attempt at the same result
                return
            raise OutputExists(
                f"{self._folder} was filled by something else while this ran",
                hint="name another folder, or remove this one and run again",
            ) from error
        sync_folder(self._folder.parent)


def _sync_tree(tree: Path) -> None:
    for parent, _, names in os.walk(tree):
        for name in names:
            fd = os.open(Path(parent, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(parent))
