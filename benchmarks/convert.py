"""Whole process against whole process: `pissa convert`, transformers + PEFT, and a plain copy.

The contenders take turns on the same checkpoint (a round of all, then the next round); between
two of them the output is removed and the disk is left to settle. Writes
`benchmarks/results/convert-NAME.json` after each part (a rank, the exact SVD, the real model,
growth); `benchmarks/summary.py` makes tables of it. A run that was cut short is taken up where it
was by the same command.

    python benchmarks/convert.py            everything: a quarter of an hour on 2 quiet cores
    python benchmarks/convert.py --brief    against niter_16 alone; growth; six minutes
    python benchmarks/convert.py --quick    rank 16, one round, no growth; two minutes
    python benchmarks/convert.py --fresh    forget what an earlier run that was cut short did
"""

from __future__ import annotations

import argparse
import functools
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
NITER_16 = "PEFT pissa_niter_16"
LOOSENED = "pissa convert, tolerance as niter_16's error"
MATCHED = "pissa convert, as inexact as niter_16"


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
    script = 'mkdir "$2" && cp -r "$1"/. "$2"/ && sync "$2"/*'
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


def loosened(
    name: str, rank: int, device: str, tolerance: Callable[[Path], float | None]
) -> Contender:
    """Return our conversion with a tolerance that is known once PEFT's result has been judged."""

    def command(source: Path, out: Path) -> list[str]:
        return pissa(rank, device, tolerance(source)).command(source, out)

    return Contender(name, command, "pissa_init")


def tolerance_of(quality: dict[str, dict]) -> float:
    """Return what niter_16 missed, as a tolerance of two digits."""
    return float(f"{quality[NITER_16]['missed']:.1e}")


def loosest(bench: Bench, source: Path, rank: int, missed: float) -> float | None:
    """Return the largest tolerance with which we miss no more than that, as measured."""
    script = [sys.executable, str(HERE / "energy.py"), str(source), str(truth_of(bench, source))]
    options = ["--rank", str(rank), "--loosest", str(missed)]
    return json.loads(run_measured([*script, *options]).stdout)


def truth_of(bench: Bench, source: Path) -> Path:
    return bench.work / f"truth-{source.name}.npz"


def compare(
    bench: Bench,
    source: Path,
    rank: int,
    contenders: list[Contender],
    quality: dict[str, dict] | None = None,
) -> list[dict]:
    """Let the contenders take turns; return one record each, with every run in it.

    `quality` is filled in the first round, as each is judged.
    """
    runs: dict[str, list[Measured]] = {c.name: [] for c in contenders}
    quality = {} if quality is None else quality
    for turn in range(bench.rounds):
        # There and back: whoever follows one that leaves much memory finds it sooner.
        for contender in contenders[:: -1 if turn % 2 else 1]:
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
        "phases": told(runs[0]),
        "work_s": statistics.median(work_seconds(run) for run in runs),
        "runs": [{k: v for k, v in asdict(run).items() if k != "stdout"} for run in runs],
    }


def work_seconds(run: Measured) -> float:
    """Return the time without imports and planning, as the process itself told it."""
    phases = told(run)
    if not phases:
        return run.wall_s
    return sum(seconds for phase, seconds in phases.items() if phase not in ("import", "planning"))


def told(run: Measured) -> dict[str, float]:
    """Return the phases that a process told of itself; nothing for one that does not."""
    if not run.stdout.startswith("{"):
        return {}
    said = json.loads(run.stdout)
    return said.get("phase_seconds", said)


def judge(bench: Bench, source: Path, adapter: Path, rank: int) -> dict:
    truth = truth_of(bench, source)
    script = [sys.executable, str(HERE / "energy.py"), str(source), str(truth), str(adapter)]
    return json.loads(run_measured([*script, "--rank", str(rank)]).stdout)[0]


def clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


def at_rank(bench: Bench, source: Path, rank: int, *, brief: bool = False) -> list[dict]:
    """Compare at one rank, with our tolerance as it is and loosened to niter_16's accuracy."""
    print(f"{source.name}, rank {rank}", file=sys.stderr)
    device = bench.device
    contenders = [copy(), pissa(rank, device), peft("pissa_niter_16", rank, device)]
    if brief:
        return compare(bench, source, rank, contenders)
    quality: dict[str, dict] = {}
    matched = functools.cache(
        lambda source: loosest(bench, source, rank, quality[NITER_16]["missed"])
    )
    contenders.append(loosened(LOOSENED, rank, device, lambda _: tolerance_of(quality)))
    contenders.append(loosened(MATCHED, rank, device, matched))
    contenders.append(peft("pissa_niter_4", rank, device))
    records = compare(bench, source, rank, contenders, quality)
    for entry in records:
        if entry["contender"] == LOOSENED:
            entry["contender"] = f"pissa convert, tolerance {tolerance_of(quality):g}"
        elif entry["contender"] == MATCHED:
            entry["contender"] = f"{MATCHED}: tolerance {matched(source):g}"
    return records


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
    parser.add_argument("--fresh", action="store_true", help="forget a run that was cut short")
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
    name = args.name or args.device.replace(":", "")
    path = HERE / "results" / f"convert-{name}{'-quick' if args.quick else ''}.json"
    facts = {
        "machine": machine(args.device),
        "device": args.device,
        "rounds": bench.rounds,
        "checkpoint_bytes": (source / "model.safetensors").stat().st_size,
    }
    parts = Parts(work / f"{path.stem}.partial.json", facts, fresh=args.fresh)
    result: dict = {**facts, "synthetic": []}
    for rank in args.ranks[:1] if args.quick else args.ranks:
        fewer = bench if rank <= 16 else Bench(work, args.device, max(1, bench.rounds - 1))
        brief = args.brief
        result["synthetic"] += parts.do(
            f"rank {rank}",
            lambda: at_rank(fewer, source, rank, brief=brief),  # noqa: B023
        )
        write(path, result)
    rest = {"exact": against_exact, "real": lambda bench, _: real_model(bench)}
    rest = {} if args.quick or args.brief else rest
    if not args.quick:
        rest["growth"] = lambda bench, _: growth(bench)
    for part, measure in rest.items():
        result[part] = parts.do(part, lambda: measure(bench, source))  # noqa: B023
        write(path, result)
    parts.forget()
    print(path)


class Parts:
    """What has been measured so far, on disk, so that a run that is cut short can be taken up."""

    def __init__(self, path: Path, facts: dict, *, fresh: bool) -> None:
        self._path = path
        stored = {} if fresh or not path.exists() else json.loads(path.read_text())
        same = stored.get("facts") == json.loads(json.dumps(facts))
        self._stored = stored if same else {"facts": facts, "parts": {}}

    def do(self, part: str, measure: Callable[[], object]) -> object:
        """Return the measurements of a part; measure it unless that has been done."""
        done = self._stored["parts"]
        if part not in done:
            done[part] = measure()
            write(self._path, self._stored)
        return done[part]

    def forget(self) -> None:
        """The whole is done."""
        self._path.unlink(missing_ok=True)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def write(path: Path, data: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
