"""The way there and back: a pair made of a tiny model, trained by stock PEFT, and converted."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa_core.adapters import open_sink, open_source, request_digest
from pissa_core.events import Event, Published
from pissa_core.lora.conversion import convert_adapter
from pissa_core.lora.patterns import value_for
from pissa_core.lora.planning import check_lora_plan, make_lora_plan, open_adapters
from pissa_core.refs import LocalRef
from pissa_core.runtime import Runtime
from pissa_core.spec import LoraOptions
from pissa_core.traffic import Traffic


def to_lora(
    trained: Path, out: Path, initial: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Convert from folder to folder; return the manifest."""
    events = list(to_lora_course(trained, out, initial, **options))
    (published,) = [event for event in events if isinstance(event, Published)]
    return dict(published.manifest)


def to_lora_course(
    trained: Path,
    out: Path,
    initial: Path | None = None,
    *,
    slots: int | None = None,
    device: str = "cpu",
    traffic: Traffic | None = None,
    **options: Any,
) -> Generator[Event]:
    """Return the events of a conversion from folder to folder, as they happen."""
    asked = LoraOptions(**options)
    given = None if initial is None else LocalRef(str(initial))
    found = open_adapters(LocalRef(str(trained)), given, open_source)
    digest = request_digest(
        "pissa-to-lora", [found.trained, found.initial], asked.model_dump(), str(out)
    )
    sink = open_sink(LocalRef(str(out)), digest=digest)
    plan = make_lora_plan(found, asked, open_source)
    runtime = Runtime(device=device, slots=slots, traffic=traffic)
    check_lora_plan(plan, found, sink, runtime)
    yield from convert_adapter(plan, found.trained, found.initial, sink, runtime)


def train(
    model: Any, loss_of: Callable[[Any], Tensor], *, steps: int = 4, rate: float = 2e-2
) -> None:
    """Take some steps with Adam on all that is trainable."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    model.eval()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(dict(edit(load_file(path))), path, metadata={"format": "pt"})


def made_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    rank: int = 4,
    **fields: Any,
) -> Path:
    """Write an adapter of random factors, without any model."""
    random = torch.Generator().manual_seed(seed)
    saved = LoraConfig(r=rank, target_modules=sorted(shapes), **fields).to_dict()
    saved = {key: sorted(v) if isinstance(v, set) else v for key, v in saved.items()}
    tensors = {}
    for module, (m, n) in shapes.items():
        key = f"base_model.model.{module}"
        r = value_for(module, saved["rank_pattern"], rank)
        tensors[f"{key}.lora_A.weight"] = torch.randn(r, n, generator=random).to(dtype)
        tensors[f"{key}.lora_B.weight"] = torch.randn(m, r, generator=random).to(dtype)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
