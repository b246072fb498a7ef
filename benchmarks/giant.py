"""A giant from Hub to Hub: memory, disk and traffic of a model that fits nowhere here.

The test Hub serves a Llama 3 70B from nothing (real headers, 30 shards of 4.6 GB, noise that is
made as it is read) and swallows what is sent while hashing it. One layer is converted. Writes
`benchmarks/results/giant-NAME.json`; `benchmarks/summary.py` makes a table of it.

    python benchmarks/giant.py           every side an eighth as long: 2.2 GB, about two minutes
    python benchmarks/giant.py --full    all 141 GB; it takes checksums of all that first
    python benchmarks/giant.py --full --cases 2    that case anew; the others stay as stored
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from measure import machine, run_measured

HERE = Path(__file__).resolve().parent
HUB = HERE.parent / "tests" / "hub"
sys.path.insert(0, str(HUB.parent))

from hub.giants import Llama  # noqa: E402

SOURCE, OUTPUT = "big/llama-3-70b", "me/llama-3-70b-pissa"
LAYER = 40
_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Case:
    """One way through: what the Hub can, and how much disk there is, in shards."""

    name: str
    copies: bool
    budget_shards: float


CASES = (
    Case("the Hub copies untouched shards", copies=True, budget_shards=3),
    Case("every shard passes through", copies=False, budget_shards=3),
    Case("less disk than a shard takes", copies=True, budget_shards=0.75),
)


@dataclass(frozen=True)
class Bench:
    """Where to work, and on which giant."""

    work: Path
    scale: int
    device: str
    rank: int

    @property
    def model(self) -> Llama:
        return Llama().scaled(self.scale)

    def run(self, case: Case) -> dict:
        """Convert once and return what it took."""
        print(f"{case.name} …", file=sys.stderr, flush=True)
        sizes = {path: blob.size for path, blob in self.model.files().items()}
        largest = max(sizes.values())
        budget = int(case.budget_shards * largest)
        scratch = self.work / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        with self.hub(case, swallow_from=largest // 8) as endpoint:
            with sampled(scratch) as disk:
                measured = run_measured(self.command(scratch, budget), env=environment(endpoint))
            counts = json.loads(urllib.request.urlopen(f"{endpoint}/_counts").read())
        return {
            "case": case.name,
            "model_bytes": sum(sizes.values()),
            "shards": sum(path.endswith(".safetensors") for path in sizes),
            "largest_shard_bytes": largest,
            "disk_budget": budget,
            "peak_disk_bytes": disk["peak"],
            "load": os.getloadavg()[0],
            "wall_s": measured.wall_s,
            "cpu_s": measured.cpu_s,
            "peak_bytes": measured.peak_bytes,
            "peak_anonymous_bytes": measured.peak_anonymous_bytes,
            **json.loads(measured.stdout),
            **traffic(counts, sizes),
        }

    def command(self, scratch: Path, budget: int) -> list[str]:
        script = [sys.executable, str(HERE / "hub_to_hub.py"), SOURCE, OUTPUT]
        limits = ["--scratch", str(scratch), "--disk-budget", str(budget)]
        asked = ["--layers", str(LAYER), "--rank", str(self.rank), "--device", self.device]
        return [*script, *limits, *asked]

    @contextmanager
    def hub(self, case: Case, *, swallow_from: int) -> Iterator[str]:
        """Run the Hub as a process of its own; yield its address."""
        options = ["--giant", SOURCE, "--scale", str(self.scale), "--token", "me=hf_bench"]
        options += ["--checksums", str(self.work / "checksums.json")]
        options += ["--swallow-from", str(swallow_from), "--storage", str(self.work / "hub")]
        options += ["--cross-repo"] if case.copies else []
        process = subprocess.Popen(
            [sys.executable, str(HUB), *options], stdout=subprocess.PIPE, text=True
        )
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
            shutil.rmtree(self.work / "hub", ignore_errors=True)


def environment(endpoint: str) -> dict[str, str]:
    hub = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_bench", "HF_HUB_DISABLE_XET": "1"}
    return os.environ | hub | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def traffic(counts: dict, sizes: dict[str, int]) -> dict:
    """Return bytes down and up, by byte of model, and how often a shard came or went at most."""
    down, up = sum(counts["sent"].values()), sum(counts["received"].values())
    total = sum(sizes.values())
    shards = {path: size for path, size in sizes.items() if path.endswith(".safetensors")}
    fetched = [counts["sent"].get(f"{SOURCE}/{path}", 0) / shards[path] for path in shards]
    return {
        "down_bytes": down,
        "up_bytes": up,
        "down_per_byte": down / total,
        "up_per_byte": up / total,
        "shards_downloaded": sum(share > 0.5 for share in fetched),
        "downloads_of_a_shard": max(fetched),
        "uploads_of_a_file": max(counts["uploads"].values(), default=0),
        "requests": counts["requests"],
        "commits": len(counts["commits"]),
    }


@contextmanager
def sampled(folder: Path) -> Iterator[dict[str, int]]:
    """Watch how much disk a folder takes; the dict's `peak` is the most that was seen."""
    seen, ended = {"peak": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            seen["peak"] = max(seen["peak"], disk_usage(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def disk_usage(folder: Path) -> int:
    """Return the bytes that files below a folder have allocated."""
    total = 0
    for parent, _, names in os.walk(folder):  # passes over folders that go meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_blocks * 512
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all 141 GB")
    parser.add_argument("--scale", type=int, default=8, help="every side so many times shorter")
    parser.add_argument("--cases", type=int, nargs="+", default=range(1, len(CASES) + 1))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="name of the result; default: device and scale")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "giant")
    args = parser.parse_args()
    scale = 1 if args.full else args.scale
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.work.resolve(), scale, args.device, args.rank)
    facts = {
        "machine": machine(args.device),
        "device": args.device,
        "scale": scale,
        "layer": LAYER,
        "rank": args.rank,
    }
    name = args.name or f"{args.device.replace(':', '')}{'' if scale == 1 else f'-{scale}'}"
    path = HERE / "results" / f"giant-{name}.json"
    for number in args.cases:
        store(path, facts, bench.run(CASES[number - 1]))
    print(path)


def store(path: Path, facts: dict, run: dict) -> None:
    """Put one case's figures in the place of its earlier ones; other cases' stay.

    Figures taken under other circumstances (`facts`) are not kept beside new ones.
    """
    stored = json.loads(path.read_text()) if path.is_file() else {}
    runs = stored.pop("runs", [])
    if stored != facts:
        runs = []
    runs = [run, *(other for other in runs if other["case"] != run["case"])]
    order = [case.name for case in CASES]
    runs.sort(key=lambda each: order.index(each["case"]))
    path.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
