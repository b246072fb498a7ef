"""Measure the truncated SVD of single matrices: ours, torch's, sklearn's, and the exact one.

    python benchmarks/kernel.py [--device cpu|cuda] [--shapes 5632x2048,...] [--quick]

Shapes are those of a 0.6 B Llama, in bfloat16. Every contender gets the weights as stored and the
whole machine, in the better of two ways: one matrix at a time with all threads, or as many at a
time as there are cores with one BLAS thread each. Seconds are per matrix, best round. Truth is a
float64 eigendecomposition of the Gram matrix. Writes results/kernel-DEVICE.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from checkpoint import heavy_tailed
from measure import machine
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from pissa_core.slots import usable_cores
from pissa_core.svd import truncated_svd

RESULTS = Path(__file__).resolve().parent / "results"
RANKS = (16, 64, 128)
SHAPES = "5632x2048,2048x2048,256x2048"
Triplets = tuple[Tensor, Tensor, Tensor]


def spikes_over_a_bulk(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Return 128 spikes that end at the edge of a noise bulk: nothing separates rank 128."""
    bulk = torch.randn(m, n, generator=generator) / (math.sqrt(m) + math.sqrt(n))
    k = min(128, m, n)
    left = torch.linalg.qr(torch.randn(m, k, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    return bulk + (left * torch.logspace(0.8, 0, k)) @ right.T


SPECTRA = {"heavy tail over a bulk": heavy_tailed, "spikes into a bulk": spikes_over_a_bulk}


def ours(tolerance: float, device: str) -> Callable[[Tensor, int], Triplets]:
    """Return `auto` to a tolerance, on weights as stored."""

    def run(W: Tensor, rank: int) -> Triplets:
        found = truncated_svd(W, rank, method="auto", tolerance=tolerance, niter=0, seed=0)
        return found.U, found.S, found.Vt

    return run


def torch_lowrank(niter: int) -> Callable[[Tensor, int], Triplets]:
    """Return what PEFT's pissa_niter_N runs."""

    def run(W: Tensor, rank: int) -> Triplets:
        U, S, V = torch.svd_lowrank(W.float(), q=rank, niter=niter)
        return U, S, V.T

    return run


def sklearn_randomized(W: Tensor, rank: int) -> Triplets:
    """Run sklearn's randomized_svd with its defaults."""
    found = randomized_svd(W.float().numpy(), rank, random_state=0)
    U, S, Vt = (torch.from_numpy(part.copy()) for part in found)
    return U, S, Vt


def exact(W: Tensor, rank: int) -> Triplets:
    """Run what PEFT's "pissa" runs."""
    U, S, Vt = torch.linalg.svd(W.float(), full_matrices=False)
    return U[:, :rank], S[:rank], Vt[:rank]


def contenders(device: str, quick: bool) -> Iterator[tuple[str, Callable[[Tensor, int], Triplets]]]:
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        yield f"auto {tolerance:g}", ours(tolerance, device)
    yield "torch niter 4", torch_lowrank(4)
    yield "torch niter 16", torch_lowrank(16)
    if device == "cpu":
        yield "sklearn", sklearn_randomized
    if not quick:
        yield "exact", exact


class Truth:
    """The spectrum of W in float64."""

    def __init__(self, W: Tensor) -> None:
        self.W = W.double()
        G = self.W.T @ self.W if W.shape[0] >= W.shape[1] else self.W @ self.W.T
        self.energies = torch.linalg.eigvalsh(G).flip(0).clamp(min=0)

    def judge(self, found: Triplets) -> dict[str, float]:
        U, S, Vt = (part.to(self.W) for part in found)
        best = float(self.energies[: len(S)].sum())
        rest = self.W - (U * S) @ Vt
        removed = float(self.W.square().sum() - rest.square().sum())
        sigma = self.energies[: len(S)].sqrt()
        return {
            "missed": max(0.0, (best - removed) / best),
            "worst_sigma": float(((S - sigma).abs() / sigma).max()),
        }


def seconds_per_matrix(run: Callable[[], object], device: str, rounds: int) -> tuple[float, str]:
    """Return the best time for one matrix, and how many were in flight."""
    if device != "cpu":
        return _best(lambda: (run(), torch.cuda.synchronize()), rounds), "1"
    cores = usable_cores()
    torch.set_num_threads(cores)
    alone = _best(run, rounds)
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def together() -> None:
            for done in [pool.submit(run) for _ in range(cores)]:
                done.result()

        abreast = _best(together, rounds) / cores
    torch.set_num_threads(cores)
    return (alone, "1") if alone <= abreast else (abreast, str(cores))


def _best(run: Callable[[], object], rounds: int) -> float:
    times = []
    run()
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def measure_shape(m: int, n: int, spectrum: str, args: argparse.Namespace) -> Iterator[dict]:
    W = SPECTRA[spectrum](m, n, torch.Generator().manual_seed(m + n)).bfloat16().to(args.device)
    truth = Truth(W)
    exact_once: dict[str, float] = {}
    for rank in RANKS:
        for name, contender in contenders(args.device, args.quick):
            found = contender(W, rank)
            if name == "exact" and exact_once:
                timing = exact_once  # its time does not depend on the rank
            else:
                rounds = 1 if name == "exact" else args.rounds
                seconds, abreast = seconds_per_matrix(
                    lambda run=contender, r=rank: run(W, r), args.device, rounds
                )
                timing = {"seconds": seconds, "in_flight": abreast}
            if name == "exact":
                exact_once = timing
            yield {
                "shape": f"{m}x{n}",
                "spectrum": spectrum,
                "rank": rank,
                "contender": name,
                **timing,
                **truth.judge(found),
            }


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown, one table for each spectrum and shape."""
    lines: list[str] = []
    for key in dict.fromkeys((row["spectrum"], row["shape"]) for row in rows):
        group = [row for row in rows if (row["spectrum"], row["shape"]) == key]
        lines += [f"\n### {key[1]}, {key[0]}\n"]
        lines += ["| rank | contender | ms a matrix | against niter 16 | missed | worst σ |"]
        lines += ["|---:|---|---:|---:|---:|---:|"]
        for row in group:
            peer = next(
                r for r in group if r["rank"] == row["rank"] and r["contender"] == "torch niter 16"
            )
            lines.append(
                f"| {row['rank']} | {row['contender']} | {row['seconds'] * 1e3:.0f} "
                f"| {peer['seconds'] / row['seconds']:.1f}× | {row['missed']:.1e} "
                f"| {row['worst_sigma']:.1e} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="without the exact SVD")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for spectrum in SPECTRA:
        for shape in args.shapes.split(","):
            m, n = map(int, shape.split("x"))
            for row in measure_shape(m, n, spectrum, args):
                rows.append(row)
                print(json.dumps(row), flush=True)
            store(args, rows)


def store(args: argparse.Namespace, rows: list[dict]) -> None:
    """Write what has been measured so far, as JSON and as tables."""
    where = machine(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"kernel-{args.device}"
    stem.with_suffix(".json").write_text(
        json.dumps({"machine": where, "rounds": args.rounds, "rows": rows}, indent=1) + "\n"
    )
    title = f"## Single matrices, {args.device}: {where.get('gpu') or where['processor']}\n"
    about = (
        "`python benchmarks/kernel.py`: bfloat16 weights, one contender at a time with the whole "
        "machine, the better of one "
        "matrix with all threads and one thread a matrix. *missed*: share of the optimal energy; "
        "*worst σ*: largest relative error of a top-r singular value.\n"
    )
    stem.with_suffix(".md").write_text(title + "\n" + about + table(rows))


if __name__ == "__main__":
    main()
