"""The process that plans imports no more than it needs, and misses nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tinymodels
import torch
from cli_tools import PISSA, plant_strangers

from app.cli.child import child
from app.cli.planner import Pending
from pissa_core.adapters.local import LocalSource
from pissa_core.errors import PissaError
from pissa_core.planning import make_plan
from pissa_core.spec import parse_config

_BEGIN = """
import json, sys
from pathlib import Path
from app.lean import import_for_a_plan, import_torch
import_torch()
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
there("torch._dynamo", "torch.distributed.tensor", "torch._meta_registrations")
"""
_BEGIN_WORK = """
import sys
from app.lean import quick_imports
with quick_imports():
    import torch
print(torch.Generator().manual_seed(0).initial_seed(), "torch._meta_registrations" in sys.modules)
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
    assert last == "False False False"
    for (folder, config), plan in zip(asked, plans, strict=True):
        whole = make_plan(LocalSource(Path(folder)), parse_config(config))
        assert json.loads(plan) == whole.to_json()


_PLAN_WITH_WHAT_IT_TAKES = """
import json, sys
from app.lean import import_torch
from app.planning import _make
import_torch()
plan = _make(json.loads(sys.stdin.read()))
print(json.dumps(plan.to_json()))
print(*(name in sys.modules for name in ("torch._meta_registrations", "scipy")))
"""
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(("rope", "kernels"), [({}, "False"), (_LLAMA_3, "True")])
def test_kernels_for_meta_tensors_are_imported_where_a_class_needs_them(
    rope: dict[str, object], kernels: str, tmp_path: Path
) -> None:
    folder = tinymodels.save_model("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_bytes())
    config["rope_parameters"].update(rope)
    (folder / "config.json").write_text(json.dumps(config))
    asked = {"model": str(folder), "config": {"rank": 2}, "limits": {}}
    plan, there = said(_PLAN_WITH_WHAT_IT_TAKES, asked=json.dumps(asked))
    assert there == f"{kernels} False"
    whole = make_plan(LocalSource(folder), parse_config({"rank": 2}))
    assert json.loads(plan) == whole.to_json()


@pytest.mark.slow
@pytest.mark.parametrize("begin", [_BEGIN, _BEGIN_WORK])
def test_the_compiler_is_itself_again_afterwards(begin: str) -> None:
    assert said(begin, _COMPILE)[-1] == "2.0"


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="of CPU builds alone")
def test_work_on_a_cpu_needs_generators_and_no_other_kernels() -> None:
    assert said(_BEGIN_WORK) == ["0 False"]


def test_transformers_lists_its_models_once() -> None:
    again = (
        "from transformers.utils.import_utils import create_import_structure_from_path as made\n"
    )
    again += "print(made.cache_info().hits > 100)"
    assert said(_BEGIN, again)[-1] == "True"


_ASKS_FOR_MORE = """
import importlib.abc, importlib.util, sys
class Finder(importlib.abc.MetaPathFinder):
    '''Has a module ask, at its end, for what the stand-ins do not have.'''
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            exec(ASKS, module.__dict__)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "asks"),
    [
        ("peft.utils.constants",
         "from transformers.distributed.parallel_utils import wait_tensor"),
        ("transformers.masking_utils",
         "from torch._dynamo._trace_wrapped_higher_order_op import trace_wrapped"),
        ("accelerate.hooks", "import torch._dynamo.config"),
    ],
)  # fmt: skip
def test_where_less_does_not_do_more_is_imported(module: str, asks: str, tmp_path: Path) -> None:
    """As with a release of the libraries that asks for more than today's."""
    folder = tinymodels.save_model("llama", tmp_path / "llama")
    asked = json.dumps([(str(folder), {"rank": 2})])
    spoilt = f"MODULE, ASKS = {module!r}, {asks!r}" + _ASKS_FOR_MORE
    plan = said(spoilt, _BEGIN, _PLAN_ALL, asked=asked)[-2]
    whole = make_plan(LocalSource(folder), parse_config({"rank": 2}))
    assert json.loads(plan) == whole.to_json()


@pytest.mark.parametrize("question", [b"", b'{"model": "./cut off'])
def test_a_planner_that_is_asked_nothing_ends_with_its_parent(question: bytes) -> None:
    command = [sys.executable, "-m", "app.planning"]
    done = subprocess.run(command, input=question, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


@pytest.mark.parametrize(
    ("words", "status"),
    [(["convert"], 2), (["plan", "./nowhere"], 1), (["convert", "-h"], 0), (["jobs", "-h"], 0)],
)
def test_a_command_that_plans_nothing_leaves_no_planner(words: list[str], status: int) -> None:
    *_, said_status, children = said(
        "import psutil\nfrom app.cli import _run\n",
        f"print(int(_run({words})), psutil.Process().children(), sep='\\n')",
    )
    assert (said_status, children) == (str(status), "[]")


def test_the_planner_that_was_begun_ahead_is_the_one_that_is_asked(tmp_path: Path) -> None:
    folder = tinymodels.save_model("llama", tmp_path / "llama")
    *_, status, begun = said(
        "import sys\nbegun = []\n"
        "def hook(event, about):\n"
        "    if event == 'subprocess.Popen' and 'app.planning' in about[1]:\n"
        "        begun.append('click' in sys.modules and 'pydantic' in sys.modules)\n"
        "sys.addaudithook(hook)\nfrom app.cli import _run\n",
        f"print(int(_run(['plan', {str(folder)!r}, '--json'])), begun, sep='\\n')",
    )
    assert (status, begun) == ("0", "[False]")


def test_nothing_is_imported_from_the_folder_a_command_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tinymodels.save_model("llama", tmp_path / "llama")
    plant_strangers(folder)
    monkeypatch.chdir(folder)
    command = [PISSA, "plan", ".", "--rank", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "planning\n")
    assert json.loads(done.stdout)["model_class"] == "LlamaForCausalLM"


def test_what_the_planner_did_not_expect_is_told() -> None:
    with child(debug=False) as one:
        one.process.stdin.write(b'{"kind": "none"}\n')
        with pytest.raises(PissaError, match="ended with status 1: KeyError: 'none'"):
            Pending(one).text()
