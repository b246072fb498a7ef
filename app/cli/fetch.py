"""`pissa fetch`: bring a job's files here, checked, and all at once.

Files are gathered in ``.NAME.pissa-fetch-JOB`` beside the folder asked for, which appears by one
rename when every checksum is right. A download that is interrupted goes on at the byte it
reached. An adapter names its base by path, so that of a result the service kept is rewritten to
the folder it lies in now, and the manifest's entry for that one file with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import click

from app.cli import tables
from app.cli.errors import on_interrupt
from app.cli.http import Service, job_path
from app.cli.options import job_argument, json_option
from app.cli.progress import Display, Pace, Snapshot, display
from app.cli.units import size
from pissa_core.errors import DownloadCorrupt, OutputExists, UnsafePath, error_from
from pissa_core.layout.sidefiles import MANIFEST
from pissa_core.lora.classes import class_for

ADAPTER_CONFIG = "pissa_init/adapter_config.json"
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a job's result."""

    path: str
    nbytes: int
    sha256: str


@click.command()
@job_argument
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def fetch(*, job_id: str, folder: Path, as_json: bool) -> None:
    """Download a finished job's files.

    Every checksum is verified before DIR appears; until then it must not exist, or be empty.
    Where the adapter names a folder of the service as its base, it is made to name DIR, and the
    manifest's entry for that file with it. Interrupted, the same command goes on where it
    stopped.
    """
    target = folder.expanduser().absolute()
    _refuse_occupied(target)
    service = Service.from_environment()
    files = list_files(service, job_id)
    resume = "interrupted: the same command goes on where this one stopped"
    with on_interrupt(resume), display() as shown, _staging(target, job_id) as staging:
        Download(service, job_id, staging, shown, sum(file.nbytes for file in files)).run(files)
        point_adapter_at(staging, target)
        _publish(staging, target)
    total = sum(file.nbytes for file in files)
    if as_json:
        tables.print_json({"output": str(target), "files": len(files), "bytes": total})
        return
    tables.print_facts({"output": str(target), "files": str(len(files)), "bytes": size(total)})
    print(f"\n{how_to_load(target)}")


def list_files(service: Service, job_id: str) -> list[RemoteFile]:
    """Return the files of a job that succeeded.

    Raises:
        PissaError: ``conflict``, if it has not (yet) succeeded.
    """
    job = service.get(job_path(job_id))
    if job["status"] != "succeeded":
        ended = job["status"] in ("failed", "cancelled")
        raise error_from(
            "conflict",
            f"job {job_id} is {job['status']}; only the files of one that succeeded can be fetched",
            f"`pissa resume {job_id}` lets it go on, `pissa watch {job_id}` says why it ended"
            if ended
            else f"`pissa watch {job_id}` waits for it",
        )
    if job.get("kind") == "verify":
        raise error_from(
            "conflict",
            f"job {job_id} is a verification, which makes no files",
            f"its report is {service.url}/{job_path(job_id, 'manifest')}",
        )
    listed = service.get(job_path(job_id, "files"))["files"]
    files = [RemoteFile(str(f["path"]), int(f["size"]), str(f["sha256"])) for f in listed]
    for file in files:
        _refuse_unsafe(file.path)
    return files


class Download:
    """The transfer of one job's files into a staging folder."""

    def __init__(
        self, service: Service, job_id: str, staging: Path, shown: Display, total: int
    ) -> None:
        """Prepare; nothing is transferred yet."""
        self._service, self._job_id, self._staging = service, job_id, staging
        self._shown, self._total = shown, total
        self._pace, self._done = Pace(), 0
        self._number, self._files = 0, 0

    def run(self, files: Sequence[RemoteFile]) -> None:
        """Bring every file whose right bytes are not here yet."""
        self._files = len(files)
        for file in files:
            # A partial file that a crash or an edit has spoilt is found by its checksum, and
            # then begun anew once.
            if not self._bring(file) and not self._bring(file):
                raise DownloadCorrupt(
                    f"{file.path} arrived twice with another checksum than the service promises",
                    hint="run the command again; if it stays so, the service's disk is damaged",
                )
            self._number += 1
            self._show()

    def _bring(self, file: RemoteFile) -> bool:
        """Complete one file; False, and nothing left of it, if its checksum is wrong then."""
        path = self._staging / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        before = self._done
        with path.open("a+b") as out:
            if out.tell() > file.nbytes:
                out.truncate(0)
            digest = hashlib.sha256()
            out.seek(0)
            while chunk := out.read(CHUNK):
                digest.update(chunk)
                self._advance(len(chunk), fresh=False)
            if (start := out.tell()) < file.nbytes:
                digest = self._receive(file, out, digest, start)
            out.flush()
            os.fsync(out.fileno())
            if out.tell() == file.nbytes and digest.hexdigest() == file.sha256:
                return True
        path.unlink()
        self._done = before
        return False

    def _receive(
        self, file: RemoteFile, out: Any, digest: hashlib._Hash, start: int
    ) -> hashlib._Hash:
        path = job_path(self._job_id, "files", quote(file.path))
        with self._service.stream(path, start=start) as answer:
            if start and answer.status_code != 206:
                out.truncate(0)
                self._done -= start
                digest = hashlib.sha256()
            for chunk in answer.iter_bytes(CHUNK):
                out.write(chunk)
                digest.update(chunk)
                self._advance(len(chunk), fresh=True)
        return digest

    def _advance(self, nbytes: int, *, fresh: bool) -> None:
        self._done += nbytes
        self._pace.add(nbytes if fresh else 0)
        self._show()

    def _show(self) -> None:
        self._shown.show(
            Snapshot(
                label="fetching",
                noun="files",
                done=self._number,
                total=self._files,
                nbytes=self._done,
                total_nbytes=self._total,
                rate=self._pace.rate(),
                left_s=self._pace.left_s(self._total - self._done),
            )
        )


def point_adapter_at(folder: Path, final: Path) -> None:
    """Let the adapter in `folder` name `final` as its base, if it names a folder at all."""
    from pissa_core.report import canonical_json

    config_path, manifest_path = folder / ADAPTER_CONFIG, folder / MANIFEST
    if not config_path.exists():
        return
    config = json.loads(config_path.read_bytes())
    if not str(config.get("base_model_name_or_path") or "").startswith("/"):
        return
    config["base_model_name_or_path"] = str(final)
    content = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    _write(config_path, content)
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_bytes())
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        manifest["files"][ADAPTER_CONFIG] = entry
        _write(manifest_path, canonical_json(manifest))


def how_to_load(folder: Path) -> str:
    """Say in Python how to load what was fetched: a pair, a plain LoRA or a plain model."""
    if (folder / ADAPTER_CONFIG).is_file():
        return tables.loading_snippet(str(folder), model_class=model_class_in(folder))
    if (config := folder / PurePosixPath(ADAPTER_CONFIG).name).is_file():
        named = json.loads(config.read_bytes())
        named = named if isinstance(named, dict) else {}
        base, revision = named.get("base_model_name_or_path"), named.get("revision")
        return tables.lora_snippet(str(folder), base, revision, class_for(named))
    return tables.plain_snippet(str(folder), model_class=model_class_in(folder))


def model_class_in(folder: Path) -> str | None:
    """Return the class that config.json names, if transformers itself may have it."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else None
    if not isinstance(config, dict) or "auto_map" in config:
        return None
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and first.isidentifier() else None


def _refuse_occupied(target: Path) -> None:
    occupied = any(target.iterdir()) if target.is_dir() else os.path.lexists(target)
    if occupied:
        raise OutputExists(
            f"{target} exists and is not an empty folder",
            hint="name another folder, or remove this one first",
        )


def _refuse_unsafe(path: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise UnsafePath(f"the service names a file {path!r}, which would leave the folder")


@contextmanager
def _staging(target: Path, job_id: str) -> Iterator[Path]:
    """Open the staging folder beside `target`, for one process at a time."""
    staging = target.parent / f".{target.name}.pissa-fetch-{job_id}"
    staging.mkdir(parents=True, exist_ok=True)
    fd = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExists(
                f"another process is fetching job {job_id} into {target}",
                hint="wait for it, or name another folder",
            ) from error
        yield staging
    finally:
        os.close(fd)


def _publish(staging: Path, target: Path) -> None:
    for parent, _, _ in os.walk(staging):
        _sync(Path(parent))
    try:
        staging.rename(target)
    except OSError:
        _refuse_occupied(target)
        raise
    _sync(target.parent)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
