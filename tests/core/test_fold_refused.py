"""What pissa-to-base refuses, one case a line: the code, and a sentence that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tinymodels
import torch
from conversions import checksums, convert_to, fold_to
from hub.faults import Fault
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file

from pissa_core.adapters import open_source
from pissa_core.errors import (
    HubUnavailable,
    OutputExists,
    OutputInsideSource,
    OutputIsSource,
    PissaError,
    RateLimited,
)

WEIGHTS = "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model = tinymodels.save_model("llama", folder / "model")
    convert_to(model, folder / "pair", {"rank": 4})
    return folder


@pytest.fixture
def place(made, tmp_path) -> Path:
    """A folder with model, pair and an adapter of its own, free to be spoiled."""
    for name in ("model", "pair"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copytree(made / "pair" / "pissa_init", tmp_path / "adapter")
    edit_config(tmp_path, base_model_name_or_path=str(tmp_path / "pair"))
    edit_weights(lambda tensors: tensors[Q_PROJ].add_(0.5))(tmp_path)  # no longer the initial one
    return tmp_path


def edit_config(place: Path, **values: object) -> None:
    path = place / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "adapter" / WEIGHTS
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def config(**values: object) -> Callable[[Path], None]:
    return lambda place: edit_config(place, **values)


def edit_manifest(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "pair" / "pissa_manifest.json"
        manifest = json.loads(path.read_text())
        edit(manifest)
        path.write_text(json.dumps(manifest))

    return change


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda place: (place / "adapter" / old).rename(place / "adapter" / new)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ][0, 0] = float("nan")


def misshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ][:3].clone()


def double(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].double()


def damage(place: Path) -> None:
    path = place / "adapter" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def another_rank(place: Path) -> None:
    """An adapter for the same modules that was not trained from the initial one."""
    edit_config(place, r=2, lora_alpha=2)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for key, value in tensors.items():
            tensors[key] = (value[:2] if ".lora_A." in key else value[:, :2]).clone()

    edit_weights(cut)(place)


def only_queries(place: Path) -> None:
    edit_config(place, target_modules=["q_proj"])

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "q_proj" not in key]:
            del tensors[key]

    edit_weights(keep)(place)


def never_split(place: Path) -> None:
    """The original's weights where the residual's were: every name and shape is right."""
    shutil.copy(place / "model" / "model.safetensors", place / "pair" / "model.safetensors")


def not_the_targets_own(tensors: dict[str, torch.Tensor]) -> None:
    key = Q_PROJ.replace("lora_A", "base_layer")
    tensors[key] = torch.zeros(32, 32)


def extra_key(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ.replace("layers.0", "layers.7")] = tensors[Q_PROJ].clone()


def homeless(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.score.weight"] = torch.zeros(3, 32)


CASES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "another base": (
        config(base_model_name_or_path="org/another"),
        "wrong_base",
        "trained on org/another.*pair",
    ),
    "another revision": (
        config(base_model_name_or_path="org/another", revision="v2"),
        "wrong_base",
        "org/another@v2",
    ),
    "a plain model": (
        edit_manifest(lambda manifest: manifest.update(kind="pissa-to-base")),
        "wrong_base",
        "no residual model.*pissa-to-base",
    ),
    "a damaged manifest": (
        edit_manifest(lambda manifest: manifest.pop("files")),
        "header_invalid",
        "pissa_manifest.json.*damaged.*files",
    ),
    "decomposes again": (
        config(init_lora_weights="pissa_niter_4"),
        "adapters_do_not_match",
        "init_lora_weights='pissa_niter_4'.*decompose",
    ),
    "another scaling": (
        config(lora_alpha=8),
        "adapters_do_not_match",
        "rank 4 and scaling 2 in the adapter, rank 4 and scaling 1 in",
    ),
    "another rank": (another_rank, "adapters_do_not_match", "has rank 2 .* rank 4 "),
    "fewer modules": (only_queries, "adapters_do_not_match", "is a residual.*nothing for it"),
    "a key too many": (
        edit_weights(extra_key),
        "adapters_do_not_match",
        r"layers\.7\.self_attn\.q_proj\.lora_A\.weight, which is no target",
    ),
    "a key too few": (
        edit_weights(lambda tensors: tensors.pop(Q_PROJ)),
        "adapters_do_not_match",
        r"no tensor .*layers\.0\.self_attn\.q_proj\.lora_A\.weight",
    ),
    "another shape": (
        edit_weights(misshape),
        "adapters_do_not_match",
        r"shape \[3, 32\].*asks for \[4, 32\]",
    ),
    "no such modules": (
        config(target_modules=["c_attn"]),
        "adapters_do_not_match",
        "no module.*c_attn",
    ),
    "a residual of other weights": (
        never_split,
        "wrong_base",
        r"model\.safetensors of .*pair has the sha256 .* manifest lists",
    ),
    "a residual that is not listed": (
        edit_manifest(lambda manifest: manifest["files"].pop("model.safetensors")),
        "wrong_base",
        r"model\.safetensors of .*pair is not listed in its manifest",
    ),
    "a target's own weight, changed": (
        edit_weights(not_the_targets_own),
        "unsupported_adapter",
        r"q_proj\.base_layer\.weight: .*and it is not model\.layers\.0\.self_attn\.q_proj",
    ),
    "DoRA": (config(use_dora=True), "unsupported_adapter", "DoRA.*magnitude"),
    "bias of B": (config(lora_bias=True), "unsupported_adapter", "sets lora_bias"),
    "bare parameters": (
        config(target_parameters=["mlp.experts"]),
        "unsupported_adapter",
        "sets target_parameters",
    ),
    "a field of tomorrow": (config(use_magic=3), "unsupported_adapter", "sets use_magic"),
    "a whole tensor without a place": (
        edit_weights(homeless),
        "unsupported_adapter",
        r"score\.weight.*no tensor of that shape",
    ),
    "no LoRA": (config(peft_type="LOHA"), "unsupported_adapter", "type 'LOHA'"),
    "only a pickle": (
        rename(WEIGHTS, "adapter_model.bin"),
        "unsupported_adapter",
        "has no adapter_model.safetensors",
    ),
    "no config": (
        rename("adapter_config.json", "config.json"),
        "unsupported_adapter",
        "no adapter",
    ),
    "float64": (edit_weights(double), "unsupported_adapter", "is F64"),
    "not finite": (
        edit_weights(poison),
        "unsupported_adapter",
        r"layers\.0\.self_attn\.q_proj\.weight: .*not finite",
    ),
    "cut short": (damage, "shard_truncated", "adapter_model.safetensors was cut short"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_by_name_and_nothing_is_left(place, case, hub):
    change, code, says = CASES[case]
    change(place)
    before = checksums(place)
    with pytest.raises(PissaError, match=says) as caught:
        fold_to(
            place / "pair",
            place / "adapter",
            place / "out",
            partial(open_source, endpoint=hub.endpoint),
        )
    assert caught.value.code == code
    assert "\n" not in caught.value.message
    assert checksums(place) == before
    assert not list(place.glob(".out*"))


def test_the_trained_adapter_itself_is_accepted(place):
    manifest = fold_to(place / "pair", place / "adapter", place / "out")
    assert manifest["adapter"]["initial"] is False


def test_the_original_is_no_base_for_the_adapter(place):
    with pytest.raises(PissaError, match=r"trained on .*pair, and nothing says") as caught:
        fold_to(place / "model", place / "adapter", place / "out")
    assert caught.value.code == "wrong_base"


def test_the_pair_itself_is_no_adapter_but_says_where_one_is(place):
    with pytest.raises(PissaError, match="holds no adapter") as caught:
        fold_to(place / "pair", place / "pair", place / "out")
    assert caught.value.hint is not None
    assert "subfolder pissa_init" in caught.value.hint


def test_a_residual_moved_elsewhere_is_known_by_the_name_it_had(place):
    (place / "pair").rename(place / "moved")
    own = json.loads((place / "moved/pissa_init/adapter_config.json").read_text())
    edit_config(place, base_model_name_or_path=own["base_model_name_or_path"])
    fold_to(place / "moved", place / "adapter", place / "out")


def test_a_copy_of_the_residual_is_known_by_its_manifest(place):
    shutil.copytree(place / "pair", place / "copy")
    edit_config(place, base_model_name_or_path=str(place / "copy"))
    fold_to(place / "pair", place / "adapter", place / "out")


@pytest.mark.parametrize(
    ("status", "error"), [(503, HubUnavailable), (429, RateLimited)], ids=["503", "429"]
)
def test_a_hub_that_is_away_is_no_wrong_base(place, hub, open_hub, status, error):
    """Whether the base that the adapter names is a copy of the residual cannot be asked now."""
    edit_config(place, base_model_name_or_path="org/copy")
    headers = {"Retry-After": "60"} if status == 429 else {}
    hub.faults.add(Fault("/api/models/org/copy", times=10**6, status=status, headers=headers))
    with pytest.raises(error, match=r"org/copy is a copy of .*pair cannot be asked now") as caught:
        fold_to(place / "pair", place / "adapter", place / "out", lambda ref: open_hub(ref.repo_id))
    assert caught.value.retryable
    assert caught.value.hint
    assert not list(place.glob(".out*"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_embedding_is_not_trained_for_two(tmp_path):
    import peft
    import transformers

    model = tinymodels.save_model("gemma", tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    lora = peft.LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=False
    )
    wrapped = peft.get_peft_model(base, lora)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(PissaError, match=r"embed_tokens: its weight is shared with lm_head"):
        fold_to(model, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("pair", OutputIsSource),
        ("pair/inside", OutputInsideSource),
        ("adapter", OutputExists),
        ("adapter/inside", OutputInsideSource),
        ("model", OutputExists),
    ],
)
def test_outputs_that_cannot_take_the_result(place, output, error):
    before = checksums(place)
    with pytest.raises(error):
        fold_to(place / "pair", place / "adapter", place / output)
    assert checksums(place) == before


def test_what_leaves_the_range_of_the_weights_is_said(tmp_path):
    model = tinymodels.save_model("llama", tmp_path / "model", dtype="fp16")
    convert_to(model, tmp_path / "pair", {"rank": 4})
    adapter = tmp_path / "adapter"
    shutil.copytree(tmp_path / "pair/pissa_init", adapter)
    edit_weights(lambda tensors: tensors[Q_PROJ].mul_(1e7))(tmp_path)
    with pytest.raises(PissaError, match=r"q_proj\.weight: the merged weights leave the range"):
        fold_to(tmp_path / "pair", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_trained_whole_and_leaves_the_range_is_said(tmp_path):
    model = tinymodels.save_model("llama", tmp_path / "model", dtype="fp16")
    convert_to(model, tmp_path / "pair", {"rank": 4})
    shutil.copytree(tmp_path / "pair/pissa_init", tmp_path / "adapter")
    norm = "base_model.model.model.norm.weight"
    edit_weights(lambda tensors: tensors.update({norm: torch.full((32,), 1e6)}))(tmp_path)
    edit_config(tmp_path, modules_to_save=["model.norm"])
    with pytest.raises(PissaError, match=r"norm\.weight of the adapter holds values that F16"):
        fold_to(tmp_path / "pair", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bound", [MemoryError, RateLimited])
def test_a_bound_that_is_met_in_peft_is_not_its_refusal(place, monkeypatch, bound):
    """Processor time is bounded by a signal, which may come at any point."""

    def meet(*_: object, **__: object) -> None:
        raise bound("met")

    monkeypatch.setattr(LoraModel, "inject_adapter", meet)
    with pytest.raises(bound, match="met"):
        fold_to(place / "pair", place / "adapter", place / "out")
