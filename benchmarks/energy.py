"""How much energy an adapter captures, against the optimum by a float64 eigendecomposition.

    python benchmarks/energy.py CHECKPOINT TRUTH.npz ADAPTER… --rank 16
    python benchmarks/energy.py CHECKPOINT TRUTH.npz --rank 16 --loosest 6.3e-4

A sample of matrices, one of each kind from a middle layer, is compared. Captured is
‖W‖² − ‖W − B·A‖² with the factors as stored, in float64; the optimum is Σσ² of the top r.
`--loosest` tells the largest of our tolerances with which no more is missed than that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from pissa_core.split import matrix_seed
from pissa_core.svd import truncated_svd

_KEPT = 512
_TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 5e-4, 2e-4, 1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("truth", type=Path)
    parser.add_argument("adapters", type=Path, nargs="*")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loosest", type=float, metavar="MISSED")
    args = parser.parse_args()
    truth = load_truth(args.checkpoint, args.truth)
    if args.loosest is not None:
        print(json.dumps(loosest(args.checkpoint, truth, args.rank, args.loosest)))
        return
    print(json.dumps([judge(args.checkpoint, truth, a, args.rank) for a in args.adapters]))


def load_truth(checkpoint: Path, path: Path) -> dict[str, np.ndarray]:
    """Return σ² of the sampled matrices, computed the first time and kept in `path`."""
    if path.exists():
        return dict(np.load(path))
    truth = {}
    with _open(checkpoint / "model.safetensors") as file:
        for name in sample(list(file.keys())):
            W = file.get_tensor(name).double()
            G = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
            truth[name] = torch.linalg.eigvalsh(G).flip(0).clamp(min=0)[:_KEPT].numpy()
    np.savez(path, **truth)
    return truth


def sample(names: list[str]) -> list[str]:
    """Choose the 2-D weights of the layer in the middle."""
    numbers = sorted({int(p) for name in names for p in name.split(".") if p.isdecimal()})
    middle = f".{numbers[len(numbers) // 2]}."
    return sorted(
        n for n in names if middle in n and n.endswith("weight") and "norm" not in n.lower()
    )


def judge(checkpoint: Path, truth: dict[str, np.ndarray], adapter: Path, rank: int) -> dict:
    """Return missed energy (of the sample, and of its worst matrix) and the worst σ's error."""
    optimum = captured = 0.0
    worst_missed = worst_sigma = 0.0
    with (
        _open(checkpoint / "model.safetensors") as weights,
        _open(adapter / "adapter_model.safetensors") as factors,
    ):
        keys = list(factors.keys())
        for name, squares in truth.items():
            W = weights.get_tensor(name).double()
            A, B = _factors(factors, keys, name.removesuffix(".weight"))
            best = float(squares[:rank].sum())
            found = float(2 * ((B.T @ W) * A).sum() - ((B.T @ B) * (A @ A.T)).sum())
            sigma = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T)
            exact = torch.from_numpy(squares[:rank]).sqrt()
            optimum, captured = optimum + best, captured + found
            worst_missed = max(worst_missed, 1 - found / best)
            worst_sigma = max(worst_sigma, float(((sigma - exact).abs() / exact).max()))
    return {
        "missed": 1 - captured / optimum,
        "worst_missed": worst_missed,
        "worst_sigma_error": worst_sigma,
    }


def loosest(
    checkpoint: Path, truth: dict[str, np.ndarray], rank: int, missed: float
) -> float | None:
    """Return the largest tolerance with which the sample misses at most `missed`, if any does."""
    with _open(checkpoint / "model.safetensors") as file:
        weights = {name: file.get_tensor(name) for name in truth}
    optimum = sum(float(squares[:rank].sum()) for squares in truth.values())
    for tolerance in _TOLERANCES:
        found = sum(_captured(W, name, rank, tolerance) for name, W in weights.items())
        if 1 - found / optimum <= missed:
            return tolerance
    return None


def _captured(W: torch.Tensor, name: str, rank: int, tolerance: float) -> float:
    seed = matrix_seed(0, name)
    svd = truncated_svd(W, rank, method="auto", tolerance=tolerance, niter=0, seed=seed)
    left = svd.exact_side == "left"
    image = svd.U.t().double() @ W.double() if left else W.double() @ svd.Vt.t().double()
    return float(image.square().sum())


def _open(path: Path):
    return safe_open(path, framework="pt")


def _factors(factors, keys: list[str], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in float64; the adapter's path may have a prefix of the model's class."""
    (key,) = [key for key in keys if key.endswith(f".{module}.lora_A.weight")]
    A = factors.get_tensor(key).double()
    B = factors.get_tensor(key.replace(".lora_A.", ".lora_B.")).double()
    return A, B


if __name__ == "__main__":
    main()
