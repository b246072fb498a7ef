"""The demo's last step: do residual and adapter, loaded by stock PEFT, give the same outputs?

Imports torch, transformers and PEFT; no part of the service does so through this module.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftModel

_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the pair's outputs are from the original's, both computed in float32."""

    outputs: tuple[int, ...]
    largest_output: float
    largest_difference: float
    without_adapter: float


def compare_outputs(
    original: str, revision: str | None, converted: str, converted_revision: str | None = None
) -> Comparison:
    """Run the original and then the converted pair on the same random input.

    Args:
        original: repo id or folder of the original model.
        revision: the commit that was converted.
        converted: repo id or folder of the residual model, the adapter in its `pissa_init/`.
        converted_revision: the commit that was published.
    """
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(converted, revision=converted_revision)
    model_class = getattr(transformers, config.architectures[0])
    base = _load(model_class, original, revision=revision)
    inputs = random_inputs(base)
    wanted = _first_output(base, inputs)
    del base
    gc.collect()

    residual = _load(model_class, converted, revision=converted_revision)
    alone = _first_output(residual, inputs)
    pair = PeftModel.from_pretrained(
        residual, converted, subfolder="pissa_init", revision=converted_revision
    )
    found = _first_output(pair.eval(), inputs)
    return Comparison(
        outputs=tuple(wanted.shape),
        largest_output=_largest(wanted),
        largest_difference=_largest(found - wanted),
        without_adapter=_largest(alone - wanted),
    )


def random_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Make an input of the kind the model takes: token ids or pixels.

    Raises:
        ValueError: if the model takes neither.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    if model.main_input_name == "input_ids":
        ids = torch.randint(1, config.vocab_size, (1, _TOKENS), generator=generator)
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return {"input_ids": ids, **decoder}
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 224)
        height, width = (side, side) if isinstance(side, int) else side
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.randn(1, channels, height, width, generator=generator)}
    raise ValueError(f"no input can be made up for a model that takes {model.main_input_name}")


def _load(model_class: Any, name: str, **options: Any) -> Any:
    return model_class.from_pretrained(name, dtype=torch.float32, **options).eval()


@torch.inference_mode()
def _first_output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output: torch.Tensor = model(**inputs, return_dict=True)[0]
    return output


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())
