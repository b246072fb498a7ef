"""How much lies in folders of scratch while something runs; whether two results are the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from pissa_core.adapters.disk import allocated


@dataclass
class Samples:
    """The most that has been seen on the disk, and how often somebody looked."""

    peak: int = 0
    number: int = 0


@contextmanager
def sampling(parent: Path, pattern: str) -> Iterator[Samples]:
    """Look all the time how much lies in folders of scratch."""
    samples, done = Samples(), threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            total = sum(allocated(folder) for folder in parent.glob(pattern))
            samples.peak, samples.number = max(samples.peak, total), samples.number + 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def tensors_of(folder: Path) -> Mapping[str, torch.Tensor]:
    files = [*folder.glob("*.safetensors"), *folder.glob("pissa_init/*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
