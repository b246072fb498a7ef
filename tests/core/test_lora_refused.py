"""What cannot be converted back is refused by name; each message is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lora_tools
import pytest
import tinymodels
import torch
from conversions import convert_to
from lora_tools import edit_config, edit_weights, made_adapter, to_lora

from pissa_core.adapters import open_sink, open_source
from pissa_core.adapters.local import LocalSource
from pissa_core.errors import (
    AdaptersDoNotMatch,
    DiskTooSmall,
    HeaderInvalid,
    NonFiniteWeight,
    NoSafetensors,
    OutputExists,
    OutputInsideSource,
    PissaError,
    ShardTruncated,
    UnsupportedAdapter,
    UnsupportedDtype,
    WrongBase,
)
from pissa_core.lora.adapter import WEIGHTS
from pissa_core.lora.layout import scratch_bytes
from pissa_core.lora.planning import Found, check_lora_plan, make_lora_plan
from pissa_core.refs import LocalRef
from pissa_core.runtime import Runtime
from pissa_core.spec import LoraOptions

SHAPES = {"layers.0.q": (12, 16), "layers.0.v": (8, 16), "layers.1.q": (12, 16)}
Q = "base_model.model.layers.0.q"


@pytest.fixture
def adapters(tmp_path) -> tuple[Path, Path]:
    """A trained adapter and its initial one, which belong together."""
    base = {"base_model_name_or_path": str(tmp_path / "base"), "lora_alpha": 8}
    trained = made_adapter(tmp_path / "trained", SHAPES, seed=1, **base)
    return trained, made_adapter(tmp_path / "initial", SHAPES, seed=0, **base)


def refusal(adapters: tuple[Path, Path], kind: type[PissaError], **options: object) -> str:
    """Convert, expect a refusal that leaves nothing, and return its sentence."""
    trained, initial = adapters
    out = trained.parent / "lora"
    with pytest.raises(kind) as caught:
        to_lora(trained, out, initial, **options)
    assert not out.exists()
    return caught.value.message


@pytest.mark.parametrize(
    ("spelled", "there", "named"),
    [(True, False, False), ("pissa_niter_4", False, True), (True, True, True)],
)
def test_the_two_do_belong_together(adapters, tmp_path, spelled, there, named):
    """Without a manifest the base is named only where it cannot be the residual."""
    if there:
        (tmp_path / "base").mkdir()
    edit_config(adapters[1], init_lora_weights=spelled)
    manifest = to_lora(adapters[0], tmp_path / "lora", adapters[1])
    base = lora_tools.config(tmp_path / "lora")["base_model_name_or_path"]
    assert base == (str(tmp_path / "base") if named else None)
    assert "taken at its word" in manifest["lineage"]["notes"][0]


def test_a_base_with_an_initial_adapter_inside_is_a_residual(adapters, tmp_path):
    """As the authors' script saves it: the initial adapter names the original, the other does not.

    Naming the residual as the base of the result would load it on the wrong model.
    """
    shutil.copytree(adapters[1], tmp_path / "base" / "pissa_init")
    manifest = to_lora(adapters[0], tmp_path / "lora")
    assert manifest["lineage"]["original"]["name"] is None
    edit_config(tmp_path / "base" / "pissa_init", base_model_name_or_path="/the/original",
                init_lora_weights="pissa")  # fmt: skip
    manifest = to_lora(adapters[0], tmp_path / "named")
    assert manifest["lineage"]["original"]["name"] == "/the/original"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("lora_bias", True, "B has a bias of its own"),
        ("target_parameters", ["experts.w"], "stacks its factors in another way"),
        ("alora_invocation_tokens", [1, 2], "leaves the base as it is before the invocation"),
        ("use_qalora", True, "QALoRA pools the inputs"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
    ],
)
def test_a_variant_of_lora_that_is_none(adapters, field, value, words):
    edit_config(adapters[0], **{field: value})
    message = refusal(adapters, UnsupportedAdapter)
    assert f"{field}={value!r}" in message
    assert words in message


def test_another_kind_of_adapter(adapters):
    edit_config(adapters[0], peft_type="LOHA")
    assert "is of the type LOHA; only LORA" in refusal(adapters, UnsupportedAdapter)


def test_a_folder_that_is_no_adapter(adapters):
    (adapters[0] / "adapter_config.json").unlink()
    assert "holds no adapter_config.json" in refusal(adapters, UnsupportedAdapter)


def test_a_folder_above_the_adapter_is_told_where_it_is(adapters, tmp_path):
    with pytest.raises(UnsupportedAdapter) as caught:
        to_lora(tmp_path, tmp_path.parent / "lora", adapters[1])
    assert caught.value.hint == "there is one in its folder initial"


def test_weights_that_are_not_safetensors(adapters):
    (adapters[0] / "adapter_model.safetensors").rename(adapters[0] / "adapter_model.bin")
    assert "holds no adapter_model.safetensors" in refusal(adapters, NoSafetensors)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_config_that_is_none(adapters, text):
    (adapters[0] / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(adapters, HeaderInvalid)
    assert "adapter_config.json of " in message
    assert "is not valid JSON" in message or "a JSON list, not an object" in message


@pytest.mark.parametrize("alpha", [0, -1, "8", None, True])
def test_a_config_with_a_number_that_is_none(adapters, alpha):
    edit_config(adapters[0], lora_alpha=alpha)
    message = refusal(adapters, HeaderInvalid)
    assert f"lora_alpha of layers.0.q is {alpha!r}, not a positive number" in message


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_config_with_a_pattern_that_is_none(adapters, field):
    edit_config(adapters[0], **{field: {"(": 4}})
    message = refusal(adapters, HeaderInvalid)
    assert f"{field} has a key that is no regular expression" in message


class Remote(LocalSource):
    """A folder that is downloaded from, as the Hub is."""

    rereads = False


def test_a_disk_budget_that_is_too_small_is_found_before_the_work(adapters, tmp_path):
    trained, initial = (Remote(folder) for folder in adapters)
    found = Found(trained, LocalRef(str(adapters[1])), initial)
    plan = make_lora_plan(found, LoraOptions(tolerance=0.1), open_source)
    sink = open_sink(LocalRef(str(tmp_path / "lora")), digest="0" * 16)
    downloads = sum(source.files()[WEIGHTS].size for source in (trained, initial))
    needed = scratch_bytes(plan, (trained, initial))
    assert needed > downloads + 2 * plan.shards[0].size
    check_lora_plan(plan, found, sink, Runtime(disk_budget=needed))
    with pytest.raises(DiskTooSmall, match=rf"{WEIGHTS} needs {needed:,} bytes of scratch"):
        check_lora_plan(plan, found, sink, Runtime(disk_budget=needed - 1))


def test_what_a_trainer_saved_beside_an_adapter_needs_no_disk(adapters, tmp_path):
    with (adapters[0] / "optimizer.pt").open("wb") as file:
        file.truncate(1 << 42)
    trained, initial = (Remote(folder) for folder in adapters)
    found = Found(trained, LocalRef(str(adapters[1])), initial)
    plan = make_lora_plan(found, LoraOptions(), open_source)
    sink = open_sink(LocalRef(str(tmp_path / "lora")), digest="0" * 16)
    check_lora_plan(plan, found, sink, Runtime())


def test_a_file_cut_short(adapters):
    path = adapters[1] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert "was cut short" in refusal(adapters, ShardTruncated)


def test_a_factor_without_its_other_half(adapters):
    edit_weights(adapters[0], lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"})
    assert f"{Q}.lora_A.weight has no other half" in refusal(adapters, UnsupportedAdapter)


def test_no_factors_at_all(adapters):
    edit_weights(adapters[0], lambda t: {"base_model.model.norm.weight": torch.ones(3)})
    assert "holds no LoRA factors at all" in refusal(adapters, UnsupportedAdapter)


def test_a_part_of_lora_that_is_not_known(adapters):
    edit_weights(adapters[0], lambda t: {**t, f"{Q}.lora_E.weight": torch.ones(3)})
    message = refusal(adapters, UnsupportedAdapter)
    assert f"{Q}.lora_E.weight is a part of LoRA that this version does not know" in message


def test_factors_of_a_convolution(adapters):
    edit_weights(adapters[0], lambda t: {**t, f"{Q}.lora_A.weight": torch.ones(4, 16, 3)})
    assert "has the shape [4, 16, 3]; only matrices" in refusal(adapters, UnsupportedAdapter)


def test_factors_in_double_precision(adapters):
    edit_weights(adapters[0], lambda t: {k: v.double() for k, v in t.items()})
    assert "is F64; factors must be one of F32, F16, BF16" in refusal(adapters, UnsupportedDtype)


def test_ranks_that_the_config_denies(adapters):
    edit_config(adapters[0], r=8)
    message = refusal(adapters, UnsupportedAdapter)
    assert "layers.0.q: A has rank 4, B has rank 4, and adapter_config.json says 8" in message


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"tolerance": 0.1}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite(adapters, value, options):
    def spoil(tensors):
        tensors[f"{Q}.lora_B.weight"][3, 1] = value
        return tensors

    edit_weights(adapters[0], spoil)
    message = refusal(adapters, NonFiniteWeight, **options)
    assert f"{Q}.lora_B.weight of {adapters[0]} holds NaN or Inf" in message


def test_other_targets(adapters):
    drop = lambda t: {k: v for k, v in t.items() if "layers.1" not in k}  # noqa: E731
    edit_weights(adapters[0], drop)
    message = refusal(adapters, AdaptersDoNotMatch)
    assert "the targets differ: the initial adapter has layers.1.q, which the trained" in message
    edit_weights(adapters[1], lambda t: {k: v for k, v in drop(t).items() if "0.q" not in k})
    message = refusal(adapters, AdaptersDoNotMatch)
    assert "the trained adapter has layers.0.q, which the initial one has not" in message


def test_other_ranks(adapters, tmp_path):
    initial = made_adapter(tmp_path / "r3", SHAPES, seed=0, rank=3, lora_alpha=6)
    message = refusal((adapters[0], initial), AdaptersDoNotMatch)
    assert "layers.0.q has rank 4 in the trained adapter and 3 in the initial one" in message


def test_another_shape(adapters, tmp_path):
    initial = made_adapter(tmp_path / "wide", {**SHAPES, "layers.0.v": (8, 17)}, seed=0)
    message = refusal((adapters[0], initial), AdaptersDoNotMatch)
    assert "layers.0.v adapts a matrix of shape [8, 16] in the trained adapter and [8" in message


@pytest.mark.parametrize("changed", [{"lora_alpha": 4}, {"use_rslora": True}])
def test_another_scaling(adapters, changed):
    edit_config(adapters[0], **changed)
    message = refusal(adapters, AdaptersDoNotMatch)
    assert "layers.0.q has scaling" in message
    assert "in the trained adapter and 2 in the initial one" in message


def test_other_base_names(adapters, tmp_path):
    edit_config(adapters[0], base_model_name_or_path="/other/base")
    message = refusal(adapters, WrongBase)
    assert message == (
        "the trained adapter was trained on /other/base, the initial adapter belongs to "
        f"{tmp_path / 'base'}"
    )


def test_an_initial_adapter_that_nothing_leads_to(adapters):
    edit_config(adapters[0], base_model_name_or_path=None)
    with pytest.raises(WrongBase, match="does not say what base it was trained on") as caught:
        to_lora(adapters[0], adapters[0].parent / "lora")
    assert "--initial" in (caught.value.hint or "")
    edit_config(adapters[0], base_model_name_or_path="/nowhere/at all")
    with pytest.raises(WrongBase, match=r"beside it there is no initial adapter: .*nowhere"):
        to_lora(adapters[0], adapters[0].parent / "lora")
    edit_config(adapters[0], base_model_name_or_path="no such name")
    with pytest.raises(WrongBase, match="neither a folder here nor a repo"):
        to_lora(adapters[0], adapters[0].parent / "lora")


def test_the_output_is_kept_off_what_is_there(adapters):
    full = adapters[0].parent / "full"
    full.mkdir()
    (full / "mine").write_text("here first")
    with pytest.raises(OutputExists):
        to_lora(adapters[0], full, adapters[1])
    for source in adapters:
        with pytest.raises(OutputInsideSource):
            to_lora(adapters[0], source / "lora", adapters[1])


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A pair of ours, with its manifest."""
    folder = tmp_path_factory.mktemp("pair")
    tinymodels.save_model("llama", folder / "base")
    convert_to(folder / "base", folder / "pair", {"rank": 4, "target_modules": ["q_proj"]})
    return folder / "pair"


def trained_from(pair: Path, folder: Path) -> Path:
    """What training would save: the initial adapter with its factors moved."""
    shutil.copytree(pair / "pissa_init", folder)
    edit_weights(folder, lambda t: {key: 1.5 * tensor for key, tensor in t.items()})
    return folder


def test_all_is_found_through_the_trained_adapter(pair, tmp_path):
    trained = trained_from(pair, tmp_path / "trained")
    manifest = to_lora(trained, tmp_path / "lora")
    lineage = manifest["lineage"]
    assert lineage["initial"]["ref"] == str(pair / "pissa_init")
    assert lineage["residual"] == {"ref": str(pair)}
    assert lineage["original"]["name"] == str(pair.parent / "base")
    assert f"so says the manifest of {pair}" in lineage["notes"][0]
    for given in (pair, pair / "pissa_init"):
        again = to_lora(trained, tmp_path / f"lora-{given.name}", given)
        assert again["lineage"] == lineage


def test_the_initial_adapter_of_another_conversion(pair, tmp_path):
    other = convert_to(
        pair.parent / "base", tmp_path / "other", {"rank": 4, "target_modules": ["q_proj"],
                                                   "svd": {"method": "lowrank", "niter": 2}},
    )  # fmt: skip
    assert other
    trained = trained_from(pair, tmp_path / "trained")
    message = refusal((trained, tmp_path / "other" / "pissa_init"), WrongBase)
    assert f"was trained on {pair}, whose initial adapter is another than {tmp_path}" in message
    assert "its sha256 is" in message


def test_an_initial_adapter_that_was_changed(pair, tmp_path):
    moved = shutil.copytree(pair, tmp_path / "moved")
    trained = trained_from(moved, tmp_path / "trained")
    edit_weights(moved / "pissa_init", lambda t: {key: 1.1 * v for key, v in t.items()})
    edit_config(trained, base_model_name_or_path="/gone")
    edit_config(moved / "pissa_init", base_model_name_or_path="/gone")
    message = refusal((trained, moved), AdaptersDoNotMatch)
    assert f"{moved}/pissa_init is not the initial adapter that {moved} was made with" in message


def test_an_initial_config_that_was_changed(pair, tmp_path):
    moved = shutil.copytree(pair, tmp_path / "moved")
    trained = trained_from(moved, tmp_path / "trained")
    for folder in (trained, moved / "pissa_init"):
        edit_config(folder, lora_alpha=12, base_model_name_or_path=str(moved))
    message = refusal((trained, moved), AdaptersDoNotMatch)
    assert "q_proj has scaling 1 in the manifest of" in message
    assert "and scaling 3 in the initial adapter" in message


def test_a_pair_that_was_moved_is_known_by_its_manifest(pair, tmp_path):
    moved = shutil.copytree(pair, tmp_path / "moved")
    trained = trained_from(moved, tmp_path / "trained")
    edit_config(trained, base_model_name_or_path=str(moved))
    to_lora(trained, tmp_path / "converted")
    edit_config(trained, base_model_name_or_path="/elsewhere")
    message = refusal((trained, moved), WrongBase)
    assert f"was trained on /elsewhere, the initial adapter lies in {moved}" in message


def test_an_initial_adapter_whose_folder_was_renamed(pair, tmp_path):
    trained = trained_from(pair, tmp_path / "trained")
    moved = shutil.copytree(pair, tmp_path / "moved")
    (moved / "pissa_init").rename(moved / "first")
    edit_config(trained, base_model_name_or_path=str(tmp_path / "gone"))
    edit_config(moved / "first", base_model_name_or_path=str(tmp_path / "gone"))
    manifest = to_lora(trained, tmp_path / "lora", moved / "first")
    assert manifest["lineage"]["residual"] == {"ref": str(moved)}


def test_an_original_in_a_folder_of_a_repo_is_noted(pair, tmp_path):
    moved = shutil.copytree(pair, tmp_path / "moved")
    path = moved / "pissa_manifest.json"
    source = {"ref": "hf://org/name@abc/inner", "commit": "abc"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "source": source}))
    trained = trained_from(pair, tmp_path / "trained")
    edit_config(trained, base_model_name_or_path=str(moved))
    lineage = to_lora(trained, tmp_path / "lora")["lineage"]
    assert lineage["original"] == {"name": "org/name", "commit": "abc"}
    assert "org/name, in the folder inner of that repo at commit abc" in lineage["notes"][0]


def test_a_manifest_that_lists_no_initial_adapter(pair, tmp_path):
    moved = shutil.copytree(pair, tmp_path / "moved")
    manifest = json.loads((moved / "pissa_manifest.json").read_text())
    manifest["files"].pop("pissa_init/adapter_model.safetensors")
    (moved / "pissa_manifest.json").write_text(json.dumps(manifest))
    trained = trained_from(moved, tmp_path / "trained")
    edit_config(trained, base_model_name_or_path=str(moved))
    shutil.rmtree(tmp_path / "lora", ignore_errors=True)
    with pytest.raises(HeaderInvalid, match="does not list the initial adapter"):
        to_lora(trained, tmp_path / "lora", moved)
