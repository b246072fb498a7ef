"""What the pieces of one matrix's search cost on a device, and how often the search takes them.

    python benchmarks/gpu_costs.py [--device cuda|cpu] [--shape 11008x4096] [--rank 128]

For the cost model of `pissa_core.svd.routes`, which on a GPU is a guess until this has been run:
there small dense problems cost more than products of large matrices. Each piece is timed alone,
the device waited for; then one search is profiled, and PEFT's with 16 power iterations beside it.
Prints milliseconds and writes results/costs-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from checkpoint import heavy_tailed
from measure import machine
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pissa_core.svd import truncated_svd
from pissa_core.svd.operator import Operator
from pissa_core.svd.orth import orthonormal_rows, split_off
from pissa_core.svd.routes import krylov_shape

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 7
MOST_TOLD = 25
Piece = tuple[str, Callable[[], object]]


def pieces(W: Tensor, rank: int) -> Iterator[Piece]:
    """Yield each piece by its name; W (m, n) bfloat16 on the device."""
    operator, generator = Operator(W), torch.Generator().manual_seed(0)
    d, device = operator.short, W.device
    shape = krylov_shape(d, rank)
    X = torch.randn(shape.block, d, generator=generator).to(device)
    G = operator.gram()
    rough_X, rough_G = X.bfloat16(), G.bfloat16()
    yield "the Gram matrix", operator.gram
    yield f"{shape.block} vectors times the Gram matrix", lambda: X @ G
    if device.type == "cuda":  # the CPU has no such product
        yield "the same, from bfloat16", lambda: torch.mm(rough_X, rough_G, out_dtype=X.dtype)
    yield f"{shape.block} vectors times W and back", lambda: operator.apply(X)
    yield f"{shape.block} vectors to the longer side", lambda: operator.lift(X)
    yield f"{shape.block} vectors made orthonormal", lambda: orthonormal_rows(X, generator)
    K = orthonormal_rows(torch.randn(4 * shape.block, d, generator=generator).to(device), generator)
    yield f"the same against {len(K[0])} others", lambda: split_off(K[0], X, generator)
    yield from small_problems(device, generator, sorted({rank, shape.block, shape.capacity}))
    yield from of_its_peer(W, rank, generator)
    yield "an answer from the device", lambda: float(X[0, 0])


def small_problems(
    device: torch.device, generator: torch.Generator, sizes: list[int]
) -> Iterator[Piece]:
    for size in sizes:
        Y = torch.randn(size, size, generator=generator).to(device)
        S = Y @ Y.t() + size * torch.eye(size, device=device)
        D = S.double()
        yield f"eigh {size} float32", lambda S=S: torch.linalg.eigh(S)
        yield f"eigh {size} float64", lambda D=D: torch.linalg.eigh(D)
        yield f"eigvalsh {size} float64", lambda D=D: torch.linalg.eigvalsh(D)
        yield f"svd {size} float64", lambda D=D: torch.linalg.svd(D)
        yield f"cholesky {size} float64", lambda D=D: torch.linalg.cholesky_ex(D)
        yield (
            f"eigh {size} float64, there and back on the CPU",
            lambda D=D: torch.linalg.eigh(D.cpu()).eigenvectors.to(device),
        )


def of_its_peer(W: Tensor, rank: int, generator: torch.Generator) -> Iterator[Piece]:
    for side in sorted(set(W.shape)):
        Y = torch.randn(side, rank, generator=generator).to(W.device)
        yield f"qr {side} x {rank} float32", lambda Y=Y: torch.linalg.qr(Y)
    wide = torch.randn(rank, min(W.shape), generator=generator).to(W.device)
    yield (
        f"svd {rank} x {min(W.shape)} float32",
        lambda: torch.linalg.svd(wide, full_matrices=False),
    )


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call to its end on the device."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def profiled(run: Callable[[], object], device: torch.device) -> list[dict[str, object]]:
    """Return the operations of a call that take longest on the device, by their own time."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    run()
    with profile(activities=activities) as recorded:
        run()
    ours = device.type == "cuda"
    rows = [
        {
            "operation": event.key,
            "calls": event.count,
            "ms": (event.self_device_time_total if ours else event.self_cpu_time_total) / 1e3,
        }
        for event in recorded.key_averages()
        if event.device_type == DeviceType.CPU  # kernels are counted with what launched them
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:MOST_TOLD]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="11008x4096")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    m, n = map(int, args.shape.split("x"))
    device = torch.device(args.device)
    W = heavy_tailed(m, n, torch.Generator().manual_seed(m + n)).bfloat16().to(device)
    searches: dict[str, Callable[[], object]] = {
        "auto 0.0001": lambda: truncated_svd(
            W, args.rank, method="auto", tolerance=1e-4, niter=0, seed=0
        ),
        "torch niter 16": lambda: torch.svd_lowrank(W.float(), q=args.rank, niter=16),
    }
    costs = {}
    for name, run in (*searches.items(), *pieces(W, args.rank)):
        costs[name] = milliseconds(run, device)
        print(f"{costs[name]:10.3f} ms  {name}", flush=True)
    operations = {name: profiled(run, device) for name, run in searches.items()}
    for name, rows in operations.items():
        print(f"\n{name}")
        for row in rows:
            print(f"{row['ms']:10.3f} ms  {row['calls']:5d}  {row['operation']}")
    facts = {"machine": machine(args.device), "shape": args.shape, "rank": args.rank}
    facts |= {"milliseconds": costs, "operations": operations}
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"costs-{device.type}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
