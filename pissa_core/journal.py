"""The journal of one attempt at a shard: which matrices are begun and done, with checksums."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """Lines of JSON: which matrices an attempt began, and which it finished with what checksums.

    It is not synced line by line. A killed process loses nothing, since the kernel keeps what
    was written; after a crash of the machine (another boot id, or none known) lines may be
    missing, so every unfinished matrix then counts as begun. Finished ones are always verified.
    """

    def __init__(self, path: Path) -> None:
        lines = list(whole_lines(path))
        self.finished = {line["done"]: line for line in lines if "done" in line}
        self._begun = {line["begin"] for line in lines if "begin" in line}
        boot = boot_id()
        self._same_boot = bool(lines) and boot is not None and lines[0].get("boot") == boot
        self._lock = threading.Lock()
        self._file = path.open("a")
        self._file.write("\n")  # ends a line that a kill cut short

    def untouched(self, tensor: str) -> bool:
        """Whether the range of a tensor in the private copy still holds the original."""
        return self._same_boot and tensor not in self._begun

    def begin(self, tensor: str) -> None:
        """Note that the range of a tensor is about to be overwritten."""
        self._append({"begin": tensor})

    def done(self, tensor: str, checksums: list[str], row: Mapping[str, Any]) -> None:
        """Note that a matrix and its factors are written."""
        self._append({"done": tensor, "checksums": checksums, "row": dict(row)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            if "begin" in line:
                self._begun.add(line["begin"])
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a journal that are whole."""
    # After a crash of the machine there may be any bytes in it.
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def boot_id() -> str | None:
    """Return what names this run of the machine, where it says so."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else None
