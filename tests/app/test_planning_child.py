"""The process that plans imports no more than it needs, and misses nothing of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import sys
from app.planning import _import_transformers
_import_transformers()
print("scipy" in sys.modules)
import torch, transformers
with torch.device("meta"):
    model = transformers.MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig())
print(type(model).__name__, "scipy" in sys.modules)
"""


def test_scipy_is_imported_only_for_classes_that_refuse_to_be_without() -> None:
    pytest.importorskip("scipy", reason="an extra of the benchmarks")
    said = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["False", "MaskFormerForInstanceSegmentation", "True"]
