"""`pissa to-lora` on adapters of a 70B model's shape, and PEFT's way on what fits in memory.

The adapters are synthetic (bfloat16, rank 128, some 3 GB each at all 80 layers). The peer does
what PEFT does to them, and only that: both loaded, factors concatenated, one file saved; the base
model that PEFT needs in memory besides is left out. Writes `benchmarks/results/to-lora.json`.

    python benchmarks/to_lora.py                 an SVD at 2 layers, exact at 20 and at 80
    python benchmarks/to_lora.py --layers 8      a smaller run
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from measure import Measured, machine, run_measured

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
sys.path.insert(0, str(HERE.parent))

RANK = 128
HIDDEN, INNER, KEYS = 8192, 28672, 1024
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

PEER = """
import sys
import torch
from safetensors.torch import load_file, save_file
trained, initial, out = sys.argv[1:]
one, other, result = load_file(trained), load_file(initial), {}
for key, tensor in one.items():
    if "lora_A" in key:
        result[key] = torch.cat([tensor, other[key]], dim=0)
    else:
        result[key] = torch.cat([tensor, -other[key]], dim=1)
save_file(result, out, metadata={"format": "pt"})
"""


def make_adapter(folder: Path, layers: int, seed: int, shrink: int) -> int:
    """Write an adapter a tensor at a time; return its bytes."""
    import torch

    from pissa_core.tensorfile import Entry, PatchFile, make_header, memory_of

    entries = []
    for layer in range(layers):
        for name, (m, n) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (RANK, n // shrink)), ("B", (m // shrink, RANK))):
                nbytes = 2 * shape[0] * shape[1]
                entries.append(Entry(f"{key}.lora_{part}.weight", "BF16", shape, nbytes))
    header = make_header(entries)
    random = torch.Generator().manual_seed(seed)
    longest = max(entry.nbytes for entry in entries) // 2
    # One block of noise, taken from another place for each tensor: no two are alike.
    noise = torch.randn(2 * longest + len(entries), generator=random).bfloat16()
    folder.mkdir(parents=True)
    with PatchFile(folder / "adapter_model.safetensors", create_size=header.file_size) as file:
        file.write(0, header.encoded)
        for number, entry in enumerate(entries):
            values = noise[number : number + entry.nbytes // 2].contiguous()
            file.write(header.starts[entry.name], memory_of(values))
        file.sync()
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "init_lora_weights": "pissa",
        "target_modules": list(SHAPES),
        "base_model_name_or_path": "/nowhere/synthetic-70b",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return header.file_size


def ours(work: Path, *options: str) -> Measured:
    words = [str(BIN / "pissa"), "to-lora", "--trained", str(work / "trained")]
    words += ["--initial", str(work / "initial"), "--out", str(work / "out"), "--json"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    return run_measured([*words, "--device", "cpu", *options], env=environment)


def peft(work: Path) -> Measured:
    (work / "out").mkdir()
    paths = [work / name / "adapter_model.safetensors" for name in ("trained", "initial", "out")]
    return run_measured([sys.executable, "-c", PEER, *map(str, paths)])


def clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync"], check=True)


def record(contender: str, layers: int, nbytes: int, measured: Measured) -> dict:
    figures = {key: value for key, value in asdict(measured).items() if key != "stdout"}
    print(
        f"  {contender:24} {layers:3} layers {measured.wall_s:7.1f} s, "
        f"CPU {measured.cpu_s:6.1f} s, {measured.peak_bytes / 1e9:6.2f} GB",
        file=sys.stderr,
    )
    load = os.getloadavg()[0]
    return {
        "contender": contender,
        "layers": layers,
        "adapter_bytes": nbytes,
        "load": load,
    } | figures


def bench(work: Path, layers: int, shrink: int) -> list[dict]:
    """Exact at a quarter of the layers and at all, PEFT's way at the quarter, an SVD at a few."""
    exact, squeezed, peer = "pissa to-lora, exact", "pissa to-lora, rank 32", "PEFT's way"
    quarter, few = max(layers // 4, 1), max(layers // 40, 1)
    turns = [(few, [squeezed]), (quarter, [exact, peer]), (layers, [exact])]
    run = {exact: ours, squeezed: lambda work: ours(work, "--rank", "32"), peer: peft}
    records = []
    for count, contenders in turns:
        clear(work)
        nbytes = 0
        for seed, name in enumerate(("trained", "initial")):
            nbytes = make_adapter(work / name, count, seed, shrink)
        for name in contenders:
            clear(work / "out")
            records.append(record(name, count, nbytes, run[name](work)))
    clear(work)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "to-lora")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--shrink", type=int, default=1, help="divide every side by this")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "to-lora.json")
    asked = parser.parse_args()
    result = {
        "machine": machine(),
        "rank": RANK,
        "records": bench(asked.work, asked.layers, asked.shrink),
    }
    asked.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
