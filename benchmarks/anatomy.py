"""Where the CPU time of a conversion goes, piece by piece, each measured alone on one thread.

    python benchmarks/anatomy.py [--ranks 16 128] [--work FOLDER]

The sum over the cores is the least time a conversion can take here, however well its pieces
overlap. Writes results/anatomy-cpu.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from convert import HERE, LAYERS, NITER_16, Bench, write
from measure import machine, run_measured
from safetensors import safe_open

from pissa_core.slots import usable_cores
from pissa_core.spec import SvdConfig
from pissa_core.split import split_principal
from pissa_core.svd import truncated_svd
from pissa_core.svd.products import times_transposed


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """Return the CPU time of a call, the best of a few."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def child_seconds(code: str, rounds: int = 3) -> float:
    return min(run_measured([sys.executable, "-c", code]).cpu_s for _ in range(rounds))


def planner_seconds(source: Path, rank: int, rounds: int = 3) -> float:
    code = (
        "import sys, subprocess; "
        "child = subprocess.Popen([sys.executable, '-m', 'app.planning'], "
        "stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL); "
        f"child.stdin.write({json.dumps(question(source, rank))!r}.encode() + b'\\n'); "
        "child.stdin.flush(); answer = child.stdout.read(); child.wait(); "
        "assert answer.startswith(b'{\"plan\"'), answer[:500]"
    )
    bare = child_seconds("import subprocess", rounds)
    return child_seconds(code, rounds) - bare


def question(source: Path, rank: int) -> dict:
    return {"model": str(source), "config": {"rank": rank}, "limits": {}}


def of_one_layer(source: Path, rank: int, svd: SvdConfig) -> dict[str, float]:
    """Return seconds for the matrices of a layer: to find the triplets, and to do the rest."""
    search = finish = 0.0
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in sorted(n for n in list(file.keys()) if ".5." in n and "norm" not in n):
            W = file.get_tensor(name)
            find = partial(
                truncated_svd, W, rank, method="auto", tolerance=svd.tolerance, niter=0, seed=0
            )
            split = partial(split_principal, W, rank, scaling=1.0, svd=svd, seed=0, found=find())
            search += seconds(find)
            finish += seconds(partial(split, rounding="faithful", adapter_dtype=torch.float32))
    return {"search": search, "finish": finish}


def niter_16_missed(rank: int) -> float | None:
    """Return what PEFT's niter_16 was found to miss at a rank by `convert.py`."""
    stored = HERE / "results" / "convert-cpu.json"
    records = json.loads(stored.read_text())["synthetic"] if stored.exists() else []
    found = (r for r in records if (r["rank"], r["contender"]) == (rank, NITER_16))
    return next((r["quality"]["missed"] for r in found), None)


def checksum_seconds(path: Path) -> float:
    def work() -> None:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    return seconds(work, 1)


def rates() -> dict[str, float]:
    """Return GFLOP/s of one core at a product of a panel's size: ours, and plain torch's."""
    a, b = torch.randn(512, 2048), torch.randn(2048, 2048)
    ways = {
        "float32": partial(times_transposed, a, b),
        "bfloat16": partial(times_transposed, a.bfloat16(), b.bfloat16()),
        "torch.mm": partial(torch.mm, a, b.t()),
    }
    return {way: 2e-9 * 512 * 2048**2 / seconds(work, 10) for way, work in ways.items()}


def copy_seconds(source: Path, work: Path) -> float:
    target = work / "copied"
    code = ["sh", "-c", f"cp '{source}' '{target}' && sync '{target}'"]
    subprocess.run(code, check=True)
    spent = run_measured(code).cpu_s
    target.unlink()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=(16, 128))
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "bench")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source = Bench(work, "cpu", 1).checkpoint(LAYERS)
    file = source / "model.safetensors"
    torch.set_num_threads(1)
    fixed = {
        "the command: Python, torch, the engine": child_seconds(
            "import app.cli.local, app.lean\n"
            "with app.lean.quick_imports(): import pissa_core.engine"
        ),
        "the planner: torch, transformers, PEFT, the model's skeleton": planner_seconds(source, 16),
        "reading and writing the bytes, as `cp` + fsync does": copy_seconds(file, work),
        "sha256 of the output": checksum_seconds(file),
    }
    result = {"machine": machine(), "cores": usable_cores(), "gflops": rates(), "ranks": []}
    for rank in args.ranks:
        layer = of_one_layer(source, rank, SvdConfig())
        pieces = {
            **fixed,
            "singular vectors": layer["search"] * LAYERS,
            "residuals, factors, certificates": layer["finish"] * LAYERS,
        }
        part = {"rank": rank, "pieces": pieces}
        missed = niter_16_missed(rank)
        if missed is not None:
            loosened = of_one_layer(source, rank, SvdConfig(tolerance=missed))
            part["loosened"] = loosened["search"] * LAYERS
        result["ranks"].append(part)
        write(HERE / "results" / "anatomy-cpu.json", result)
        print(json.dumps(result["ranks"][-1]))


if __name__ == "__main__":
    main()
