"""Make synthetic Llama-shaped checkpoints whose spectra look like those of trained weights.

Each matrix is a noise bulk (Marchenko–Pastur) under a heavy tail of spikes that decays as a
power law into it. Seeded: the same arguments give the same bytes. Written tensor by tensor.

    python benchmarks/checkpoint.py FOLDER --layers 11
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SPIKES = 192
DECAY = 0.6


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; the defaults with 11 layers make 0.6 B parameters, 1.2 GB in bfloat16."""

    layers: int = 11
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    key_value_heads: int = 4
    vocabulary: int = 32000
    distinct: int | None = None  # layers with values of their own; the others repeat them

    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        h, i = self.hidden, self.intermediate
        kv = h // self.heads * self.key_value_heads
        yield "lm_head.weight", (self.vocabulary, h)
        yield "model.embed_tokens.weight", (self.vocabulary, h)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (h,)
            yield prefix + "mlp.down_proj.weight", (h, i)
            yield prefix + "mlp.gate_proj.weight", (i, h)
            yield prefix + "mlp.up_proj.weight", (i, h)
            yield prefix + "post_attention_layernorm.weight", (h,)
            yield prefix + "self_attn.k_proj.weight", (kv, h)
            yield prefix + "self_attn.o_proj.weight", (h, h)
            yield prefix + "self_attn.q_proj.weight", (h, h)
            yield prefix + "self_attn.v_proj.weight", (kv, h)
        yield "model.norm.weight", (h,)


def heavy_tailed(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Return an (m, n) matrix: a noise bulk, and spikes decaying as i^-0.6 down into it.

    The bulk's largest singular value is about √m + √n; the first spike stands eight times
    above it, the last ones are under it, so that there is no gap at any rank one would choose.
    """
    k = min(SPIKES, m, n)
    bulk = torch.randn(m, n, generator=generator)
    edge = math.sqrt(m) + math.sqrt(n)
    strength = 8.0 * edge * torch.arange(1, k + 1).pow(-DECAY)
    left = torch.randn(m, k, generator=generator) / math.sqrt(m)
    right = torch.randn(k, n, generator=generator) / math.sqrt(n)
    return bulk.addmm_(left * strength, right).mul_(0.02 / math.sqrt(2))


def source_of(name: str, distinct: int | None) -> str:
    """Return the name whose values a tensor has: its own, or that of the layer it repeats."""
    head, mark, rest = name.partition("model.layers.")
    layer, dot, tail = rest.partition(".")
    if distinct is None or not mark:
        return name
    return f"{head}{mark}{int(layer) % distinct}{dot}{tail}"


def make_checkpoint(folder: Path, shape: Shape, *, shards: int = 1, seed: int = 0) -> Path:
    """Write the checkpoint unless it is there already; return its folder."""
    marker = folder / "config.json"  # written last
    if marker.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    names = list(shape.tensors())
    size = -(-len(names) // shards)
    groups = [names[first : first + size] for first in range(0, len(names), size)]
    weight_map = {}
    for number, group in enumerate(groups, 1):
        path = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05}-of-{len(groups):05}.safetensors"
        )
        _write_shard(folder / path, group, seed, shape.distinct)
        weight_map |= {name: path for name, _ in group}
    if len(groups) > 1:
        index = {"metadata": {"total_size": _nbytes(names)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    marker.write_text(json.dumps(shape.config(), indent=2))
    return folder


def _write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], seed: int, distinct: int | None
) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        stop = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        repeated: dict[str, torch.Tensor] = {}
        for name, shape in tensors:
            source = source_of(name, distinct)
            values = repeated[source] if source in repeated else _values(source, shape, seed)
            if distinct is not None:
                repeated[source] = values
            file.write(values.view(torch.uint8).numpy())


def _values(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    # Each tensor has its own stream, so that its values do not depend on the number of layers.
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    m, n = shape
    if "embed" in name or "lm_head" in name:
        return (torch.randn(m, n, generator=generator) * 0.02).to(torch.bfloat16)
    return heavy_tailed(m, n, generator).to(torch.bfloat16)


def _nbytes(tensors: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(2 * math.prod(shape) for _, shape in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_checkpoint(args.folder, Shape(args.layers), shards=args.shards, seed=args.seed)


if __name__ == "__main__":
    main()
