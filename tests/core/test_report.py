"""Manifest, card and pictures: true to the rows, the same bytes every time, safe to publish."""

import json
import math
import random
import time
import xml.etree.ElementTree as ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard

from pissa_core.plan import Estimate, Matrix, Plan, ShardPlan
from pissa_core.ports import FileInfo
from pissa_core.report import card, manifest, pictures, totals
from pissa_core.report.figures import energy_share, in_plan_order, places

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")


def make_plan(layers: int = 2, *, source: str = "hf://org/tiny@" + "a" * 40, **changes) -> Plan:
    matrices = tuple(
        Matrix(
            module=f"model.layers.{layer}.{kind}",
            tensor=f"model.layers.{layer}.{kind}.weight",
            shard="model.safetensors",
            dtype="BF16",
            shape=(8, 4),
            start=0,
            stop=64,
            rank=2,
            scaling=1.0,
            transposed=False,
            key_a="a",
            key_b="b",
        )
        for layer in range(layers)
        for kind in KINDS
    )
    fields = {
        "source": source,
        "commit": "a" * 40 if source.startswith("hf://") else None,
        "model_class": "LlamaForCausalLM",
        "names_from": "transformers",
        "config": {"rank": 2, "target_modules": "all-linear"},
        "adapter_config": {},
        "shards": (ShardPlan("model.safetensors", 1000, matrices),),
        "carried": (),
        "index": None,
        "side_files": ("README.md",),
        "left_out": (),
        "refused": (),
        "estimate": Estimate(0, 0, 0, 0, 0),
    }
    return Plan(**{**fields, **changes})


def make_rows(plan: Plan, *, rank: int = 2, energy: float = 0.25) -> list[dict]:
    return [
        {
            "module": matrix.module,
            "tensor": matrix.tensor,
            "shard": matrix.shard,
            "shape": list(matrix.shape),
            "rank": rank,
            "scaling": 1.0,
            "sigma": [10.0 / (i + 1 + number) for i in range(rank)],
            "energy": energy,
            "missed": 1e-6 * (number + 1),
            "recombination_error": 1e-3,
            "method": "krylov",
        }
        for number, matrix in enumerate(plan.matrices)
    ]


FILES = {
    "model.safetensors": FileInfo(1000, "0" * 64),
    "config.json": FileInfo(10, "1" * 64),
}


def write_card(plan, rows, source_card=None, base="me/out", **extra) -> str:
    return card(plan, rows, base_model_name_or_path=base, source_card=source_card, **extra).decode()


def metadata_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_manifest_holds_what_the_plan_noted():
    plan = make_plan(notes=("no module is named 'q_prj'",))
    content = json.loads(manifest(plan, make_rows(plan), FILES))
    assert content["notes"] == ["no module is named 'q_prj'"]


def test_manifest_says_what_the_contract_names():
    plan = make_plan()
    rows = make_rows(plan)
    content = json.loads(manifest(plan, rows, FILES))
    assert set(content) == {
        "schema", "kind", "source", "config", "versions", "files", "matrices", "totals",
    }  # fmt: skip
    assert content["schema"] == 1
    assert content["kind"] == "base-to-pissa"
    assert content["source"] == {"ref": plan.source, "commit": plan.commit}
    assert content["files"]["config.json"] == {"sha256": "1" * 64, "size": 10}
    assert content["matrices"] == rows
    assert content["totals"]["max_missed"] == pytest.approx(6e-6)
    assert content["totals"]["trainable_parameters"] == 6 * 2 * (8 + 4)
    assert {"pissa-service", "torch", "peft", "transformers"} <= set(content["versions"])


def test_every_byte_is_independent_of_the_order_of_work():
    plan = make_plan(5)
    rows = make_rows(plan)
    shuffled = random.Random(1).sample(rows, len(rows))
    files = dict(reversed(FILES.items()))
    assert manifest(plan, rows, FILES) == manifest(plan, shuffled, files)
    assert write_card(plan, rows) == write_card(plan, shuffled)
    assert pictures(plan, rows) == pictures(plan, shuffled)


def test_manifest_refuses_a_number_that_json_does_not_have():
    plan = make_plan()
    rows = make_rows(plan)
    rows[0]["energy"] = math.nan
    with pytest.raises(ValueError, match="Out of range"):
        manifest(plan, rows, FILES)


def test_total_energy_weighs_each_matrix_by_its_norm():
    plan = make_plan(1)
    rows = make_rows(plan)[:2]
    rows[0] |= {"sigma": [3.0, 4.0], "energy": 0.5}  # 25 of 50
    rows[1] |= {"sigma": [1.0, 0.0], "energy": 0.1}  # 1 of 10
    assert energy_share(rows) == pytest.approx(26 / 60)
    rows[0] |= {"sigma": [0.0, 0.0], "energy": 0.0}
    assert energy_share(rows[:1]) is None
    assert totals(plan, rows).energy == pytest.approx(0.1)


def test_rows_of_a_tensor_the_plan_does_not_know_are_an_error():
    plan = make_plan(1)
    with pytest.raises(KeyError):
        in_plan_order(plan, [{**make_rows(plan)[0], "tensor": "other"}])


def test_kinds_are_told_apart_by_their_shortest_ending():
    modules = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.3.layer.0.SelfAttention.q",
        "decoder.block.3.layer.1.EncDecAttention.q",
        "decoder.block.3.mlp.experts.17.w1",
        "head",
    ]
    found = places([{"module": module} for module in modules])
    assert [place.layer for place in found] == [0, 3, 3, 3, 0]
    kinds = [place.kind for place in found]
    assert len(set(kinds)) == 5
    assert kinds[2:] == ["EncDecAttention.q", "w1", "head"]


def test_very_many_kinds_are_told_apart_in_no_time():
    rows = [{"module": f"encoder.block_{number}.attn.q_proj"} for number in range(20_000)]
    began = time.process_time()
    assert places(rows)[7].kind == "block_7.attn.q_proj"
    assert time.process_time() - began < 5  # comparing each with each takes minutes


def test_card_keeps_the_source_card_and_its_licence_below_ours():
    source = (
        "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [chat, pissa]\nbase_model: other/base\n"
        "library_name: vllm\n---\n# Tiny\nIts own words.\n"
    )
    text = write_card(make_plan(), make_rows(make_plan()), source)
    data = metadata_of(text)
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en"]
    assert data["base_model"] == "org/tiny"
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["chat", "pissa", "peft", "lora", "residual"]
    assert text.index("not** the original") < text.index("# Tiny")
    assert text.endswith("Its own words.\n")
    assert ModelCard(text).data.base_model_relation == "finetune"


@pytest.mark.parametrize(
    "source",
    [
        None,
        "---\nlicense: other\nlicense_name: '012: #x'\ntags: ['yes', 'é', '- a']\n---\nText",
        "---\nlanguage: ['no', en]\n---\nBody\r\n---\nmore: of it\n---\n",
    ],
)
def test_card_is_what_the_hubs_own_class_writes(source):
    text = write_card(make_plan(), make_rows(make_plan()), source)
    assert text == str(ModelCard(text))


@pytest.mark.parametrize("broken", ["license: [unclosed", "- a\n- list", "license: 3"])
def test_card_survives_a_source_card_with_broken_metadata(broken):
    text = write_card(make_plan(), make_rows(make_plan()), f"---\n{broken}\n---\nBody")
    assert "license" not in metadata_of(text)
    assert text.endswith("Body\n")


def test_card_of_a_local_output_does_not_hold_its_path():
    plan = make_plan(source="/data/models/tiny")
    text = write_card(plan, make_rows(plan), base="/srv/out/secret-place")
    assert "secret-place" not in text
    assert "/data/models" not in text
    assert "base_model" not in metadata_of(text)
    assert text == write_card(plan, make_rows(plan), base="/elsewhere")


def test_card_names_the_branch_in_both_loads():
    text = write_card(make_plan(), make_rows(make_plan()), revision="r16")
    assert text.count('revision="r16"') == 2
    assert 'here = "me/out"' in text
    assert "--residual hf://me/out@r16 " in text
    assert "--initial hf://me/out@r16/pissa_init " in text


def test_the_code_of_the_card_is_python():
    text = write_card(make_plan(), make_rows(make_plan()), base='a"b/c')
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "LlamaForCausalLM.from_pretrained" in code


def test_names_from_a_checkpoint_cannot_break_table_or_picture():
    plan = make_plan(1)
    rows = make_rows(plan)
    for row in rows:
        row["module"] = 'model.0.<script>|`"\ud800&'
    text = write_card(plan, rows)
    assert "<script>" not in text
    for picture in pictures(plan, rows).values():
        assert b"<script>" not in picture
        ElementTree.fromstring(picture)


def test_pictures_are_small_and_valid_for_a_large_model():
    plan = make_plan(187)  # 561 matrices
    drawn = pictures(plan, make_rows(plan, rank=128))
    assert set(drawn) == {"pissa_report/spectra.svg", "pissa_report/energy.svg"}
    for content in drawn.values():
        root = ElementTree.fromstring(content)
        assert root.tag.endswith("svg")
        assert len(content) < 200_000
        assert b"prefers-color-scheme" in content


def test_spectra_draw_each_matrix_within_its_panel():
    plan = make_plan(3)
    root = ElementTree.fromstring(pictures(plan, make_rows(plan))["pissa_report/spectra.svg"])
    lines = [node for node in root.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 9
    panels = [node for node in root.iter() if node.tag.endswith("rect")]
    assert len(panels) == len(KINDS)
    right = max(float(panel.get("x")) + float(panel.get("width")) for panel in panels)
    bottom = max(float(panel.get("y")) + float(panel.get("height")) for panel in panels)
    for line in lines:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 20 <= x <= right
            assert 56 <= y <= bottom


@pytest.mark.parametrize("sigma", [[0.0, 0.0], [5.0], [1.0, 0.0], [1e30, 1e-30]])
def test_pictures_of_extreme_spectra(sigma):
    plan = make_plan(1)
    rows = [{**row, "sigma": sigma, "energy": float(sigma[0] > 0)} for row in make_rows(plan)]
    for content in pictures(plan, rows).values():
        ElementTree.fromstring(content)


def test_map_shades_by_energy():
    plan = make_plan(1)
    rows = make_rows(plan)
    for row, energy in zip(rows, (0.1, 0.5, 1.0), strict=True):
        row["energy"] = energy
    root = ElementTree.fromstring(pictures(plan, rows)["pissa_report/energy.svg"])
    shades = [float(n.get("fill-opacity")) for n in root.iter() if n.get("fill-opacity")]
    assert shades == sorted(shades)
    assert shades[-1] == 1.0
