"""What the ways back begin with: pairs made by the service itself, and adapters trained from them.

Below ``models``: ``pair`` of ``base``, ``trained``, ``alien`` (an initial adapter of another
scaling) and ``damaged`` (the pair with a matrix that is another). On the Hub: ``pair`` and
``trained`` of ``org/base``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from client import Client
from household import Household
from hubrepo import TOKEN, USER
from huggingface_hub import HfApi
from safetensors.numpy import load_file, save_file
from worker_tools import wait_for

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make_pairs(home: Household, client: Client) -> None:
    """Make all of it, on a running service."""
    models, repo = home.folder / "models", f"{USER}/pair"
    hub = HfApi(endpoint=home.hub_url, token=TOKEN)
    for model, output in (("./base", "./pair"), ("org/base", f"hf://{repo}")):
        _convert(client, {"model": model, "output": output, "pissa": {"rank": 4}})
    _train(models / "pair" / "pissa_init", models / "trained", str(models / "pair"))
    shutil.copytree(models / "pair" / "pissa_init", models / "alien")
    _edit_config(models / "alien", lora_alpha=64)
    _damage(shutil.copytree(models / "pair", models / "damaged"))
    copy = home.folder / "copy"
    hub.snapshot_download(repo, local_dir=copy)
    _train(copy / "pissa_init", copy / "trained", repo)
    hub.create_repo(f"{USER}/trained")
    hub.upload_folder(repo_id=f"{USER}/trained", folder_path=copy / "trained")
    shutil.rmtree(copy)


def _convert(client: Client, body: dict[str, Any]) -> None:
    job_id = client.submit(body, f"pair-{body['output']}")
    wait_for(lambda: client.job(job_id)["finished_at"], "a pair", 300)
    assert client.job(job_id)["status"] == "succeeded", client.job(job_id)
    assert client.ask("DELETE", f"/v1/jobs/{job_id}").status_code == 204


def _train(initial: Path, folder: Path, base: str) -> None:
    """Stand in for a training: every factor moves."""
    shutil.copytree(initial, folder)
    moved = {key: 1.25 * tensor + 0.01 for key, tensor in load_file(initial / _WEIGHTS).items()}
    save_file(moved, folder / _WEIGHTS, metadata={"format": "pt"})
    _edit_config(folder, base_model_name_or_path=base)


def _damage(pair: Path) -> None:
    shard = sorted(pair.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, shard, metadata={"format": "pt"})


def _edit_config(folder: Path, **values: Any) -> None:
    path = folder / _CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
