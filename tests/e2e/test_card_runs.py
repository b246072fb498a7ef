"""The code on a result's card runs as it stands, and gives the original's outputs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import tinymodels
import torch
from conversions import convert_to
from transformers import AutoModelForCausalLM

from pissa_core.report.card import LOCAL_PLACEHOLDER

MORE = """
import torch
ids = torch.arange(1, 9)[None]
print(model(input_ids=ids).logits.detach().flatten().tolist())
"""


def commands_on(card: str, out: Path) -> list[list[str]]:
    (shell,) = re.findall(r"^```bash\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    lines = shell.replace(f"./{LOCAL_PLACEHOLDER}", str(out)).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    commands = [[sys.executable, "-m", "app.cli", *rest] for first, *rest in filter(None, words)]
    assert [command[3] for command in commands] == ["to-lora", "to-base"]
    return commands


def test_the_code_on_the_card_loads_the_pair(tmp_path):
    folder = tinymodels.save_model("llama", tmp_path / "model", dtype="fp32")
    convert_to(folder, tmp_path / "out", {"rank": 2})
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    code = code.replace(LOCAL_PLACEHOLDER, str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-c", code + MORE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trained" / "adapter_model.safetensors").is_file()
    for command in commands_on(card, tmp_path / "out"):
        back = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert back.returncode == 0, back.stderr
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.num_parameters() > 0
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    original = AutoModelForCausalLM.from_pretrained(folder)
    wanted = original(input_ids=torch.arange(1, 9)[None]).logits.detach().flatten()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
