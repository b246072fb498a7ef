"""The form a result takes: exact or compressed, each module's rank, scaling, dtype and config.

Exact, every number of the config that says a rank doubles and every alpha grows with it, as PEFT
does it. In any other form scalings are folded into the factors, so that every module's scaling is
lora_alpha / its rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pissa_core.lora.patterns import one_module, order_free
from pissa_core.lora.plan import LoraPlan, Update


@dataclass(frozen=True, slots=True)
class Form:
    """What a plan's result looks like.

    Attributes:
        compressed: whether the factors come from an SVD; else they are those that went in.
        folded: whether scalings are folded into the factors.
        uniform: whether all modules have one rank and one scaling.
        alpha: lora_alpha of the result, where scalings are folded and ranks differ.
    """

    compressed: bool
    folded: bool
    uniform: bool
    alpha: int

    def width(self, plan: LoraPlan, update: Update) -> int:
        """Return the rank that a module is laid out with; with a tolerance it may end with less."""
        if self.uniform and plan.options.tolerance is None:
            return max(each.bound for each in plan.updates)
        return update.bound

    def dtype(self, update: Update) -> str:
        """Return the dtype of a module's factors: float32 where they are new numbers."""
        return "F32" if self.compressed or self.folded else update.dtype

    def scaling(self, update: Update, rank: int) -> float:
        """Return the scaling that a module of this rank has in the result."""
        if not self.folded:
            return update.trained.scaling
        return 1.0 if self.uniform else self.alpha / rank


def form_of(plan: LoraPlan) -> Form:
    """Say what the result of a plan looks like."""
    options = plan.options
    widest = max(update.exact_rank for update in plan.updates)
    compressed = options.compresses(widest)
    unlike = len({update.trained.scaling for update in plan.updates}) > 1
    return Form(
        compressed=compressed,
        folded=compressed or (options.uniform and unlike),
        uniform=options.uniform,
        alpha=max(update.bound for update in plan.updates),
    )


def adapter_config(plan: LoraPlan, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return adapter_config.json of the result: the trained adapter's, with what has changed.

    Args:
        plan: what was done.
        ranks: module → its rank in the result.
    """
    return {
        **plan.trained_config,
        **_numbers(plan, ranks),
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": plan.base,
        "revision": plan.base_revision,
    }


def _numbers(plan: LoraPlan, ranks: Mapping[str, int]) -> dict[str, Any]:
    form = form_of(plan)
    if not form.compressed and not form.uniform:
        return _doubled(plan)
    most = max(ranks.values())
    if form.uniform:
        scaling = form.scaling(plan.updates[0], most)
        numbers: dict[str, Any] = {"r": most, "lora_alpha": _whole(scaling * most)}
        return numbers | {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    pattern = {one_module(name): rank for name, rank in ranks.items() if rank != most}
    return {
        "r": most,
        "lora_alpha": form.alpha,
        "use_rslora": False,
        "rank_pattern": dict(sorted(pattern.items())),
        "alpha_pattern": {},
    }


def _doubled(plan: LoraPlan) -> dict[str, Any]:
    """Ranks × 2; alphas × 2, or × √2 where the scaling is alpha / √r: the scaling stays."""
    config = plan.trained_config
    growth = math.sqrt(2) if config.get("use_rslora") else 2
    modules = [update.module for update in plan.updates]
    ranks = {key: 2 * value for key, value in (config.get("rank_pattern") or {}).items()}
    alphas = {key: growth * value for key, value in (config.get("alpha_pattern") or {}).items()}
    r, alpha = 2 * config.get("r", 8), growth * config.get("lora_alpha", 8)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": order_free(ranks, r, modules),
        "alpha_pattern": order_free(alphas, alpha, modules),
    }


def _whole(number: float) -> int | float:
    """Return a whole number as one: servers read lora_alpha as an integer."""
    return int(number) if float(number).is_integer() else number
