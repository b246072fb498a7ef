"""Fixtures of the arithmetic, and the models that conversions are tested with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tinymodels
import torch
from torch import Tensor

from pissa_core.svd import operator


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one BLAS thread, as each matrix in flight does, so that neighbours do not disturb."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be rough products on any CPU; where it has none, in float32, rounded as they are.

    So the searches and certificates that rest on them run wherever the tests do.
    """
    if operator.BFLOAT16:
        return
    exact = operator.times_transposed

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype != torch.bfloat16:
            return exact(a, b)
        return exact(a.float(), b.float()).bfloat16()

    monkeypatch.setattr(operator, "BFLOAT16", True)
    monkeypatch.setattr(operator, "times_transposed", rounded)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tinymodels.save_model("llama", tmp_path / "model", dtype="bf16")
    (folder / "tokenizer.json").write_text('{"left": "as it was"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The original card\n")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tinymodels.save_model(
        "llama", tmp_path / "sharded", dtype="bf16", max_shard_size=tinymodels.SHARDED
    )
