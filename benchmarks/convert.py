"""Whole process against whole process: `pissa convert`, transformers + PEFT, and a plain copy.

The contenders take turns on the same checkpoint (a round of all, then the next round); between
two of them the output is removed and the disk is left to settle. Writes
`benchmarks/results/convert-NAME.json`; `benchmarks/summary.py` makes tables of it.

    python benchmarks/convert.py            everything: about half an hour on 2 cores
    python benchmarks/convert.py --brief    against niter_16 alone; growth; ten minutes
    python benchmarks/convert.py --quick    rank 16, one round, no growth
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import Measured, machine, run_measured

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
sys.path.insert(0, str(HERE.parent))

LAYERS = 11
RANKS = (16, 64, 128)
COPY = "cp + fsync"


@dataclass(frozen=True)
class Contender:
    """One way to do the job: a name, and the command that writes into a folder."""

    name: str
    command: Callable[[Path, Path], list[str]]
    adapter: str | None = None


@dataclass(frozen=True)
class Bench:
    """Where to work and on what device."""

    work: Path
    device: str
    rounds: int

    def checkpoint(self, layers: int) -> Path:
        folder = self.work / f"llama-{layers}"
        script = [sys.executable, str(HERE / "checkpoint.py"), str(folder)]
        run_measured([*script, "--layers", str(layers)])
        return folder


def copy() -> Contender:
    script = 'mkdir "$2" && cp "$1"/* "$2"/ && sync "$2"/*'
    return Contender(COPY, lambda source, out: ["sh", "-c", script, "sh", str(source), str(out)])


def peft(init: str, rank: int, device: str, *more: str) -> Contender:
    def command(source: Path, out: Path) -> list[str]:
        script = [sys.executable, str(HERE / "peft_pissa.py"), str(source), str(out)]
        return [*script, "--rank", str(rank), "--init", init, "--device", device, *more]

    return Contender(f"PEFT {init}", command, "pissa_init")


def pissa(rank: int, device: str, tolerance: float | None = None) -> Contender:
    def command(source: Path, out: Path) -> list[str]:
        words = [str(BIN / "pissa"), "convert", str(source), "--out", str(out), "--json"]
        loosened = [] if tolerance is None else ["--svd-tolerance", f"{tolerance:g}"]
        return [*words, "--rank", str(rank), "--device", device, *loosened]

    label = "default tolerance" if tolerance is None else f"tolerance {tolerance:g}"
    return Contender(f"pissa convert, {label}", command, "pissa_init")


def compare(bench: Bench, source: Path, rank: int, contenders: list[Contender]) -> list[dict]:
    """Let the contenders take turns; return one record each, with every run in it."""
    runs: dict[str, list[Measured]] = {c.name: [] for c in contenders}
    quality: dict[str, dict] = {}
    for turn in range(bench.rounds):
        for contender in contenders:
            out = bench.work / "out"
            measured = run_measured(contender.command(source, out))
            runs[contender.name].append(measured)
            if contender.adapter and turn == 0:
                quality[contender.name] = judge(bench, source, out / contender.adapter, rank)
            clear(out)
            print(f"  {contender.name:38} {measured.wall_s:7.1f} s", file=sys.stderr)
    return [record(c.name, rank, runs[c.name], quality.get(c.name)) for c in contenders]


def record(name: str, rank: int, runs: list[Measured], quality: dict | None) -> dict:
    return {
        "contender": name,
        "rank": rank,
        "wall_s": statistics.median(run.wall_s for run in runs),
        "cpu_s": statistics.median(run.cpu_s for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in runs),
        "quality": quality,
        "work_s": statistics.median(work_seconds(run) for run in runs),
        "runs": [{k: v for k, v in asdict(run).items() if k != "stdout"} for run in runs],
    }


def work_seconds(run: Measured) -> float:
    """Return the time without imports and planning, as the process itself told it."""
    if not run.stdout.startswith("{"):
        return run.wall_s
    said = json.loads(run.stdout)
    phases = said.get("phase_seconds", said)
    return sum(seconds for phase, seconds in phases.items() if phase not in ("import", "planning"))


def judge(bench: Bench, source: Path, adapter: Path, rank: int) -> dict:
    truth = bench.work / f"truth-{source.name}.npz"
    script = [sys.executable, str(HERE / "energy.py"), str(source), str(truth), str(adapter)]
    return json.loads(run_measured([*script, "--rank", str(rank)]).stdout)[0]


def clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


def loosened(bench: Bench, source: Path, rank: int) -> float:
    """Return niter_16's own accuracy on this checkpoint, as a tolerance of two digits."""
    out = bench.work / "out"
    run_measured(peft("pissa_niter_16", rank, bench.device).command(source, out))
    missed = judge(bench, source, out / "pissa_init", rank)["missed"]
    clear(out)
    return float(f"{missed:.1e}")


def at_rank(bench: Bench, source: Path, rank: int, *, brief: bool = False) -> list[dict]:
    """Compare at one rank, with our tolerance as it is and loosened to niter_16's accuracy."""
    print(f"{source.name}, rank {rank}", file=sys.stderr)
    device = bench.device
    if brief:
        contenders = [copy(), pissa(rank, device), peft("pissa_niter_16", rank, device)]
        return compare(bench, source, rank, contenders)
    return compare(
        bench,
        source,
        rank,
        [
            copy(),
            pissa(rank, device),
            pissa(rank, device, loosened(bench, source, rank)),
            peft("pissa_niter_4", rank, device),
            peft("pissa_niter_16", rank, device),
        ],
    )


def against_exact(bench: Bench, source: Path, rank: int = 16) -> dict:
    """Compare with PEFT's full SVD, run on one layer only and scaled up to all of them."""
    print("against the exact SVD", file=sys.stderr)
    out = bench.work / "out"
    one = run_measured(peft("pissa", rank, bench.device, "--layers", "1").command(source, out))
    clear(out)
    (ours,) = compare(bench, source, rank, [pissa(rank, bench.device, 1e-5)])
    init = json.loads(one.stdout)["init"]
    return {
        "rank": rank,
        "ours": ours,
        "one_layer_wall_s": one.wall_s,
        "one_layer_init_s": init,
        "layers": LAYERS,
        "scaled_wall_s": one.wall_s + init * (LAYERS - 1),
    }


def growth(bench: Bench) -> list[dict]:
    """Measure our peak memory with once, twice and four times the layers."""
    once = Bench(bench.work, bench.device, rounds=1)
    records = []
    for factor in (1, 2, 4):
        source = bench.checkpoint(LAYERS * factor)
        size = (source / "model.safetensors").stat().st_size
        print(f"growth: {LAYERS * factor} layers", file=sys.stderr)
        (ours,) = compare(once, source, 16, [pissa(16, bench.device)])
        records.append({"layers": LAYERS * factor, "checkpoint_bytes": size, **ours})
        if factor > 1:
            shutil.rmtree(source)
    return records


def real_model(bench: Bench) -> list[dict]:
    from app.minilm import fetch_minilm

    return at_rank(bench, fetch_minilm(), 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="rank 16, one round, no growth")
    parser.add_argument("--brief", action="store_true", help="against PEFT's niter_16 alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--name", help="name of the result; default: the device")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "bench")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    clear(work / "out")
    bench = Bench(work, args.device, 1 if args.quick else args.rounds)
    source = bench.checkpoint(LAYERS)
    result: dict = {
        "machine": machine(args.device),
        "device": args.device,
        "rounds": bench.rounds,
        "checkpoint_bytes": (source / "model.safetensors").stat().st_size,
        "synthetic": [],
    }
    for rank in args.ranks[:1] if args.quick else args.ranks:
        result["synthetic"] += at_rank(bench, source, rank, brief=args.brief)
    if not args.quick:
        result["growth"] = growth(bench)
    if not args.quick and not args.brief:
        result["exact"] = against_exact(bench, source)
        result["real"] = real_model(bench)
    name = args.name or args.device.replace(":", "")
    path = HERE / "results" / f"convert-{name}{'-quick' if args.quick else ''}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
