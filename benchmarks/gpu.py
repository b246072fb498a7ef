"""Everything that is to be measured on a GPU, in one call.

    python benchmarks/gpu.py                  all of it: about fifteen minutes
    python benchmarks/gpu.py --part kernel    or tests, costs, convert: some minutes each

tests: `pytest -m gpu`. costs: what the pieces of a search take, see `gpu_costs`. kernel: single
matrices against PEFT's randomised SVD on the same device (wanted: 20 times faster than niter_16 at
rank 128). convert: a local checkpoint of 16 GB against `cp` + fsync of it (wanted: within 1.25
times) and PEFT's niter_16. Writes results/costs-cuda.json, kernel-cuda.json and convert-cuda.json,
with the device's name, and prints whether the figures were reached.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from pathlib import Path

import convert
from checkpoint import Shape, make_checkpoint
from measure import machine

HERE = Path(__file__).resolve().parent
RANK = 128
# 16.8 GB. Eight layers repeat, since drawing numbers takes longer than all the rest.
SHAPE = Shape(
    layers=46, hidden=4096, intermediate=11008, key_value_heads=8, vocabulary=32000, distinct=8
)
KERNEL_SHAPES = "11008x4096,4096x4096,1024x4096,28672x8192"
COPY_LIMIT, KERNEL_LIMIT = 1.25, 20.0


def tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/core/test_gpu.py"]
    subprocess.run(command, cwd=HERE.parent, check=True)


def costs() -> None:
    subprocess.run([sys.executable, str(HERE / "gpu_costs.py")], check=True)


def kernel() -> None:
    script = [sys.executable, str(HERE / "kernel.py"), "--device", "cuda", "--quick"]
    subprocess.run([*script, "--shapes", KERNEL_SHAPES], check=True, stdout=subprocess.DEVNULL)
    path = HERE / "results" / "kernel-cuda.json"
    rows = [row for row in convert.read(path)["rows"] if row["rank"] == RANK]
    for shape, spectrum in dict.fromkeys((row["shape"], row["spectrum"]) for row in rows):
        here = [r for r in rows if (r["shape"], r["spectrum"]) == (shape, spectrum)]
        (peer,) = (row for row in here if row["contender"] == "torch niter 16")
        ours = next(row for row in here if row["contender"] == "auto 0.0001")
        factor = peer["seconds"] / ours["seconds"]
        say(f"{shape}, {spectrum}, rank {RANK}: {factor:.1f} times", factor >= KERNEL_LIMIT)


def conversion(work: Path, rounds: int) -> None:
    source = make_checkpoint(work / "llama-16gb", SHAPE)
    bench = convert.Bench(work, "cuda", rounds)
    contenders = [
        convert.copy(),
        convert.pissa(16, "cuda"),
        convert.peft("pissa_niter_16", RANK, "cuda"),
    ]
    ours = convert.pissa(RANK, "cuda")
    with DeviceMemory() as memory:
        (alone,) = convert.compare(convert.Bench(work, "cuda", 1), source, RANK, [ours])
    records = convert.compare(bench, source, RANK, [contenders[0], ours, contenders[2]])
    records += convert.compare(bench, source, 16, contenders[:2])
    size = (source / "model.safetensors").stat().st_size
    facts = {"machine": machine("cuda"), "device": "cuda", "rounds": rounds}
    facts |= {"checkpoint_bytes": size, "peak_device_bytes": memory.peak, "synthetic": records}
    convert.write(HERE / "results" / "convert-cuda.json", facts)
    copied, converted, *_ = records
    factor = converted["wall_s"] / copied["wall_s"]
    say(f"{size / 1e9:.1f} GB at rank {RANK}: {factor:.2f} times cp + fsync", factor <= COPY_LIMIT)
    say(f"peak device memory {memory.peak / 1e9:.2f} GB; first run {alone['wall_s']:.1f} s", True)


def say(sentence: str, reached: bool) -> None:
    print(f"{'reached' if reached else 'MISSED '}  {sentence}", flush=True)


class DeviceMemory:
    """The most memory of the device that was in use, as its driver counts it."""

    def __enter__(self) -> DeviceMemory:
        self.peak, self._ended = 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._ended.wait(0.2):
            used = subprocess.check_output(query, text=True).split()[0]
            self.peak = max(self.peak, int(used) << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("tests", "costs", "kernel", "convert"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "bench")
    args = parser.parse_args()
    if args.part in (None, "tests"):
        tests()
    if args.part in (None, "costs"):
        costs()
    if args.part in (None, "kernel"):
        kernel()
    if args.part in (None, "convert"):
        conversion(args.work.resolve(), args.rounds)


if __name__ == "__main__":
    main()
