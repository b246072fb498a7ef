"""The process that plans imports no more than it needs, and misses nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tinymodels

from pissa_core.adapters.local import LocalSource
from pissa_core.planning import make_plan
from pissa_core.spec import parse_config

_BEGIN = """
import json, sys
from pathlib import Path
from app.lean import import_for_a_plan
import_for_a_plan()
def there(*names):
    print(*(getattr(sys.modules.get(name), "__file__", None) is not None for name in names))
there("scipy", "torch._dynamo", "torch.distributed.tensor", "peft")
"""
_BUILD = """
import torch, transformers
with torch.device("meta"):
    model = transformers.MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig())
print(type(model).__name__)
there("scipy")
"""
_PLAN_ALL = """
from pissa_core.adapters.local import LocalSource
from pissa_core.planning import make_plan
from pissa_core.spec import parse_config
for folder, config in json.loads(sys.stdin.read()):
    print(json.dumps(make_plan(LocalSource(Path(folder)), parse_config(config)).to_json()))
there("torch._dynamo", "torch.distributed.tensor")
"""
_COMPILE = """
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


def said(*script: str, asked: str = "") -> list[str]:
    command = [sys.executable, "-c", "".join(script)]
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_scipy_is_imported_only_for_classes_that_refuse_to_be_without() -> None:
    pytest.importorskip("scipy", reason="an extra of the benchmarks")
    assert said(_BEGIN, _BUILD) == [
        "False False False True", "MaskFormerForInstanceSegmentation", "True",
    ]  # fmt: skip


def test_all_architectures_are_planned_as_with_all_of_the_libraries(tmp_path: Path) -> None:
    asked = [
        (str(tinymodels.save_model(name, tmp_path / name)), {"rank": 2, **tinymodels.task_of(name)})
        for name in tinymodels.MODELS
    ]
    *plans, last = said(_BEGIN, _PLAN_ALL, asked=json.dumps(asked))[1:]
    assert last == "False False"
    for (folder, config), plan in zip(asked, plans, strict=True):
        whole = make_plan(LocalSource(Path(folder)), parse_config(config))
        assert json.loads(plan) == whole.to_json()


def test_the_compiler_is_itself_again_afterwards() -> None:
    assert said(_BEGIN, _COMPILE)[-1] == "2.0"


def test_where_less_does_not_do_all_of_the_libraries_is_imported() -> None:
    """As with a release of theirs that asks of distribution what is not there."""
    spoilt = (
        "import app.lean, torch.distributed\n"
        "def fail():\n    torch.distributed.is_available = said\n    raise RuntimeError\n"
        "said, torch.distributed.is_available = torch.distributed.is_available, fail\n"
        "app.lean._not_distributed = __import__('contextlib').nullcontext\n"
    )
    first, *_ = said(spoilt, _BEGIN)
    assert first.split()[1:] == ["False", "True", "True"]
