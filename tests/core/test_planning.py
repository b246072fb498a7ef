"""A plan is data: complete, serialisable, honest about what it will cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tinymodels import SHARDED, save_model

from pissa_core.adapters.local import LocalSource
from pissa_core.adapters.memory import MemorySource
from pissa_core.layout import Shard, TensorInfo
from pissa_core.plan import Plan
from pissa_core.planning import IMPORT_FOOTPRINT, accepted_config, make_plan, matrix_bytes
from pissa_core.spec import parse_config


def plan(folder: Path, *, slots: int = 2, memory_budget: int | None = None, **config: Any) -> Plan:
    asked = parse_config({"rank": 3, **config})
    return make_plan(LocalSource(folder), asked, slots=slots, memory_budget=memory_budget)


def test_every_shard_is_planned_with_its_matrices_in_the_order_of_offsets(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_shard_size=SHARDED)

    made = plan(tmp_path)

    on_disk = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert [shard.path for shard in made.shards] == on_disk
    assert len(on_disk) > 2
    for shard in made.shards:
        assert shard.size == (tmp_path / shard.path).stat().st_size
        starts = [matrix.start for matrix in shard.matrices]
        assert starts == sorted(starts)
        assert all(matrix.shard == shard.path for matrix in shard.matrices)
    assert len(made.matrices) == 14
    assert made.index == "model.safetensors.index.json"
    assert made.side_files == ("config.json", "generation_config.json")
    assert (made.model_class, made.names_from) == ("LlamaForCausalLM", "transformers")


def test_a_shard_without_targets_is_planned_too(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_shard_size=SHARDED)

    made = plan(tmp_path, target_modules=["layers.0.self_attn.q_proj"])

    assert len(made.shards) == len(list(tmp_path.glob("*.safetensors")))
    assert sorted(len(shard.matrices) for shard in made.shards)[:2] == [0, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta-cls", "mixtral"])
def test_a_plan_survives_json(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    task = "SEQ_CLS" if name == "roberta-cls" else None

    made = replace(plan(tmp_path, task_type=task), notes=("something to know",))

    again = Plan.from_json(made.to_json())
    assert again == replace(made, config=again.config, adapter_config=again.adapter_config)
    assert again.to_json() == made.to_json()


IN_A_PROCESS_OF_ITS_OWN = """
import re, sys
from pathlib import Path
from pissa_core.adapters.local import LocalSource
from pissa_core.planning import make_plan
from pissa_core.spec import parse_config

print(make_plan(LocalSource(Path(sys.argv[1])), parse_config({"rank": 3}), slots=2).to_json())
# Not ru_maxrss, which a child inherits from its parent.
status = Path("/proc/self/status")
print(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1] if status.exists() else 0)
"""


def test_another_process_makes_the_same_plan_within_the_import_footprint(tmp_path: Path) -> None:
    save_model("t5", tmp_path)

    other = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_A_PROCESS_OF_ITS_OWN, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},  # another order of sets
    )

    text, peak_kb = other.stdout.splitlines()
    assert text == plan(tmp_path).to_json()
    if torch.version.cuda is None and int(peak_kb):
        # Below, so that the estimate is an upper one; not far below, so that it means something.
        assert 0.6 * IMPORT_FOOTPRINT < 1024 * int(peak_kb) < IMPORT_FOOTPRINT


def test_the_accepted_config_has_every_default_and_reads_back(tmp_path: Path) -> None:
    made = plan(save_model("llama", tmp_path), init_lora_weights="pissa_niter_4")

    assert made.config["lora_alpha"] == 3
    assert made.config["svd"]["method"] == "lowrank"
    assert made.config["svd"]["niter"] == 4
    read = parse_config(made.config)
    assert accepted_config(read) == made.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_adapter_s_size_is_that_of_the_file(dtype: str, tmp_path: Path) -> None:
    save_model("roberta-cls", tmp_path, dtype="bf16", max_shard_size=SHARDED)

    made = plan(tmp_path, adapter_dtype=dtype, task_type="SEQ_CLS")

    tensors = {
        tensor.key: torch.zeros(tensor.shape, dtype=torch.bfloat16) for tensor in made.carried
    }
    for matrix in made.matrices:
        options = {"dtype": getattr(torch, dtype)}
        tensors[matrix.key_a] = torch.zeros(matrix.rank, matrix.in_features, **options)
        tensors[matrix.key_b] = torch.zeros(matrix.out_features, matrix.rank, **options)
    # Offsets take as many digits in any order as long as all tensors are there; the reference
    # writer's order differs from ours, and with it a digit here and there.
    reference = len(save(tensors, metadata={"format": "pt"}))
    assert abs(made.estimate.adapter - reference) <= 8 * len(tensors)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert made.trainable_parameters == parameters


def test_bytes_count_the_files_that_go_over(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_shard_size=SHARDED)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)

    made = plan(tmp_path)

    left = {"pytorch_model.bin"}
    sizes = [path.stat().st_size for path in tmp_path.iterdir() if path.name not in left]
    cost = made.estimate
    assert made.left_out == ("pytorch_model.bin",)
    assert cost.read == sum(sizes)
    assert cost.written == cost.read + cost.adapter
    assert cost.peak_disk > cost.written + cost.adapter


def test_memory_is_the_footprint_and_the_largest_matrices_in_flight(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    needs = sorted((matrix_bytes(m, "auto") for m in plan(tmp_path).matrices), reverse=True)

    def in_flight(**limits: int) -> int:
        return plan(tmp_path, **limits).estimate.peak_memory - IMPORT_FOOTPRINT

    assert in_flight(slots=1) == needs[0]
    assert in_flight(slots=3) == sum(needs[:3])
    assert in_flight(slots=3, memory_budget=needs[0] + 1) == needs[0] + 1
    assert in_flight(slots=3, memory_budget=1) == needs[0]


def test_four_times_the_layers_need_the_same_memory() -> None:
    small, large = (plan_of_llama(layers=layers) for layers in (3, 12))

    assert len(large.matrices) == 4 * len(small.matrices)
    assert large.estimate.peak_memory == small.estimate.peak_memory
    assert large.estimate.read > 2 * small.estimate.read


def test_a_refused_target_costs_nothing_and_is_listed(tmp_path: Path) -> None:
    save_model("gemma", tmp_path)

    made = plan(tmp_path, target_modules=["lm_head"])

    assert [refusal.code for refusal in made.refused] == ["tied_weight"]
    assert made.matrices == ()
    assert made.estimate.peak_memory == IMPORT_FOOTPRINT


def test_llama_70b_is_planned_from_its_headers_alone() -> None:
    made = plan_of_llama(layers=80, hidden=8192, inner=28672, vocabulary=128256)

    assert len(made.matrices) == 560
    assert made.refused == ()
    assert made.adapter_config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert made.estimate.read > 141e9


def plan_of_llama(
    *, layers: int, hidden: int = 256, inner: int = 512, vocabulary: int = 1000
) -> Plan:
    """Plan a Llama of any size from a layout alone; no byte of its weights exists."""
    from pissa_core import planning

    source, layout = _llama(layers, hidden, inner, vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "read_layout", lambda _: layout)
        return make_plan(source, parse_config({}), slots=2)


def _llama(layers: int, hidden: int, inner: int, vocabulary: int) -> tuple[MemorySource, Any]:
    from pissa_core.layout import Layout

    narrow = hidden // 8
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (narrow, hidden),
            f"{prefix}.self_attn.v_proj.weight": (narrow, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    name, position, tensors = "model.safetensors", 1000, []
    for key, shape in shapes.items():
        stop = position + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        tensors.append(TensorInfo(key, name, "BF16", shape, position, stop))
        position = stop
    shard = Shard(name, position, 1000, tuple(tensors))
    source = MemorySource({"config.json": json.dumps(config).encode()})
    return source, Layout(config, (shard,), None, ("config.json",), (), None)
