"""PiSSA as users make it today: load the model, let PEFT initialise, save adapter and residual.

    python benchmarks/peft_pissa.py CHECKPOINT OUT --rank 16 --init pissa_niter_16

Prints its phases in seconds as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

STARTED = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--init", default="pissa_niter_16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="initialise only the first layers")
    args = parser.parse_args()

    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    phases = {"import": time.perf_counter() - STARTED}
    config = json.loads((args.checkpoint / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    lap = time.perf_counter()
    model = model_class.from_pretrained(args.checkpoint).to(args.device)
    phases["load"], lap = time.perf_counter() - lap, time.perf_counter()

    torch.manual_seed(0)  # PEFT's randomised SVD draws from the global generator
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank,
        init_lora_weights=args.init,
        **_targets(args.layers),
    )
    peft_model = get_peft_model(model, lora)
    phases["init"], lap = time.perf_counter() - lap, time.perf_counter()

    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(args.out / "pissa_init")
    peft_model.unload().save_pretrained(args.out)
    phases["save"] = time.perf_counter() - lap
    print(json.dumps(phases))


def _targets(layers: int | None) -> dict:
    if layers is None:
        return {"target_modules": "all-linear"}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {"target_modules": names, "layers_to_transform": list(range(layers))}


if __name__ == "__main__":
    main()
