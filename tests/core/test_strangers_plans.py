"""Whatever config.json says, planning ends: with a plan or a code, in bounded time and memory.

The planner is a process of its own with the limits that the service gives its planners.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worker_tools import write_llama

from pissa_core.errors import LONGEST

MEMORY = 1 << 30
CPU_S = 60
IMPORTED = 1 << 30
"""What torch, transformers and PEFT take by themselves is less."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip


class Planner:
    def __init__(self, folder: Path) -> None:
        self.model = write_llama(folder / "model", layers=1, hidden=8, shards=1)
        command = [sys.executable, str(Path(__file__).with_name("planner.py"))]
        self.process = subprocess.Popen(
            [*command, str(MEMORY), str(CPU_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def plan(self, config: bytes, **question: Any) -> dict[str, Any]:
        """Plan the model with this config.json; hold the answer to the bounds."""
        (self.model / "config.json").write_bytes(config)
        asked = {"model": str(self.model), "config": {"rank": 2}, "limits": {}, **question}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the planner ended with status {self.process.wait()} at {config[:300]!r}"
        answer: dict[str, Any] = json.loads(line)
        assert answer["cpu_s"] < CPU_S + 5
        assert answer["peak"] < IMPORTED + MEMORY
        return answer

    def code(self, **changes: Any) -> str:
        """Plan Llama with some fields changed; return the error's code, or "planned"."""
        return code_of(self.plan(json.dumps({**LLAMA, **changes}).encode()))


def code_of(answer: dict[str, Any]) -> str:
    error = answer.get("error")
    if error is None:
        return "planned"
    assert error["code"] != "internal", error
    assert len(error["message"]) <= LONGEST + 1
    return str(error["code"])


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    started = Planner(tmp_path_factory.mktemp("planner"))
    with started.process:
        yield started
        started.process.kill()


def test_the_model_itself_is_planned(planner):
    assert planner.code() == "planned"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"num_hidden_layers": 10**9}, "unsupported_architecture"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "unsupported_architecture"),
        ({"hidden_size": 10**12}, "unsupported_architecture"),
        ({"hidden_size": 10**30}, "unsupported_architecture"),
        ({"num_labels": 10**9}, "unsupported_architecture"),
        ({"architectures": ["SwinModel"], "model_type": "swin", "depths": [10**6],
          "num_heads": [2], "embed_dim": 4}, "unsupported_architecture"),
        ({"architectures": ["A" * 10**6]}, "planned"),
        ({"model_type": "A" * 10**6}, "planned"),
        ({"model_type": ["llama"]}, "unsupported_architecture"),
        ({"auto_map": {"AutoModelForCausalLM": "evil/code--modeling.Evil"}}, "planned"),
        ({"_attn_implementation": "kernels-community/evil"}, "planned"),
    ],
)  # fmt: skip
def test_absurd_configs(planner, changes, code):
    assert planner.code(**changes) == code


words = st.sampled_from(
    ["", "llama", "gpt2", "x" * 5000, "\0", "../../etc", "é", "auto", "float32"]
)
numbers = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([10**5, 2**31, 2**53, 2**63, 10**30, 0.5, 1e308, -1e9]),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip
fields = st.sampled_from([
    *LLAMA, "max_position_embeddings", "head_dim", "rope_parameters", "rope_scaling", "id2label",
    "num_labels", "layer_types", "torch_dtype", "dtype", "auto_map", "text_config", "pad_token_id",
    "transformers_version", "attn_implementation", "quantization_config", "is_encoder_decoder",
    "tie_encoder_decoder", "torchscript", "problem_type", "attention_bias", "_name_or_path",
])  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(fields, anything, min_size=1, max_size=3))
def test_a_config_may_say_anything(planner, changes):
    planner.code(**changes)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(fields, anything, min_size=1, max_size=3))
def test_a_config_may_say_anything_else(planner, changes):
    planner.code(**changes)


@settings(max_examples=20, deadline=None)
@given(st.one_of(
    st.binary(max_size=60),
    anything.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[" * 10**5, b'{"a":' * 900 + b"1" + b"}" * 900, b"{}", b'{"a":' * 10**5]),
))  # fmt: skip
def test_a_config_may_be_anything(planner, config):
    code_of(planner.plan(config))
