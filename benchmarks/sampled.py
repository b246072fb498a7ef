"""Where the CPU time of a whole conversion goes, as `perf` samples it.

    python benchmarks/sampled.py [--ranks 16 128] [--rounds 5] [--work FOLDER]

Of several conversions the one with the median CPU time is told. Needs Linux's `perf` and the right
to use it; without them nothing is written. Writes results/sampled-cpu.json.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from convert import HERE, LAYERS, Bench, clear, pissa, write
from measure import machine

HERTZ = 999
SAMPLE = re.compile(r"\s*(\d+)/(\d+)\s+\S+ (.*) \((.*)\)$")
# What a sample's symbol or file says of it; the first that fits counts.
KINDS = (
    ("the kernel: writing into the page cache", r"copy_folio_from_iter|copy_page_from_iter"),
    ("the kernel: reading from the page cache", r"_copy_to_iter|copy_page_to_iter"),
    ("the kernel: new memory, zeroed", r"clear_page|folio_zero|do_anonymous_page"),
    ("the kernel: all else", r"\(\[kernel|\(\[guest"),
    ("sha256 and xxhash", r"libcrypto|_xxhash|_hashlib"),
    ("products", r"perf-\d+\.map|\[JIT\]|\[unknown\]|//anon|dnnl|Xbyak|mkl_|ideep"),
    ("torch: conversions, sums, small problems", r"libtorch|libc10|libgomp"),
    ("Python and libc", r""),
)
PLANNER = "the planner, a process of its own: imports, the model's skeleton"
COMMAND = "the command's first thread: imports, progress, publishing"


def kind_of(pid: str, tid: str, symbol_and_file: str, command: str) -> str:
    """Return what a sample is counted as."""
    if pid != command:
        return PLANNER
    if tid == pid:
        return COMMAND
    return next(kind for kind, pattern in KINDS if re.search(pattern, symbol_and_file))


def profile(command: list[str], recorded: Path) -> tuple[float, Counter[str]]:
    """Return the wall time of a command and its CPU seconds by kind."""
    began = time.monotonic()
    record = ["perf", "record", "-F", str(HERTZ), "-o", str(recorded), "--", *command]
    subprocess.run(record, check=True, capture_output=True)
    wall_s = time.monotonic() - began
    script = ["perf", "script", "-i", str(recorded), "-F", "pid,tid,ip,sym,dso"]
    lines = subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()
    samples = [match.groups() for match in map(SAMPLE.match, lines) if match]
    first = samples[0][0]
    kinds = Counter(kind_of(pid, tid, f"{sym} ({dso})", first) for pid, tid, sym, dso in samples)
    return wall_s, Counter({kind: count / HERTZ for kind, count in kinds.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=(16, 128))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "bench")
    args = parser.parse_args()
    if shutil.which("perf") is None:
        sys.exit("perf is not installed: nothing is profiled")
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source, out = Bench(work, "cpu", 1).checkpoint(LAYERS), work / "out"
    result: dict = {"machine": machine(), "rounds": args.rounds, "ranks": []}
    for rank in args.ranks:
        runs = []
        for _ in range(args.rounds):
            clear(out)
            time.sleep(3)  # the disk settles
            runs.append(profile(pissa(rank, "cpu").command(source, out), work / "perf.data"))
        clear(out)
        wall_s, kinds = sorted(runs, key=lambda run: run[1].total())[len(runs) // 2]
        result["ranks"].append({"rank": rank, "wall_s": wall_s, "cpu_s": dict(kinds)})
        print(rank, f"{wall_s:.1f} s", dict(kinds.most_common()))
    (work / "perf.data").unlink()
    write(HERE / "results" / "sampled-cpu.json", result)


if __name__ == "__main__":
    main()
