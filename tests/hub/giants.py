"""Models that are too large to keep: real headers over weights that are made as they are read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from hub.blobs import Blob, Bytes

_PIECE = 4 << 20
_ONE_AT_A_TIME = threading.Lock()
_PERIOD = (32 << 20) + 1  # numbers; odd, so that no two rows of a matrix are the same


@dataclass(frozen=True)
class Weights:
    """A safetensors file of `size` bytes: its header, then bfloat16 noise without end.

    Attributes:
        known: the checksum, where somebody has taken it before.
    """

    header: bytes = field(repr=False)
    size: int
    known: str | None = None

    @cached_property
    def sha256(self) -> str:
        return self.known or self.checksum()

    def checksum(self) -> str:
        """Read the whole file and take its checksum."""
        running = hashlib.sha256()
        for start in range(0, self.size, _PIECE):
            running.update(self.read(start, min(start + _PIECE, self.size)))
        return running.hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        if start < len(self.header):
            head = self.header[start:stop]
            return head if stop <= len(self.header) else head + self.read(len(self.header), stop)
        at = (start - len(self.header)) % (2 * _PERIOD)
        length = max(0, stop - start)
        with _ONE_AT_A_TIME:  # whoever comes first makes it for all
            noise = _noise()
        piece = noise[at : at + length]
        while len(piece) < length:
            piece += noise[: length - len(piece)]
        return piece


@cache
def _noise() -> bytes:
    """Return one period: random sign and mantissa, exponents from 2^-9 to 2^-6."""
    bits = np.random.Generator(np.random.PCG64(0)).integers(0, 1 << 16, _PERIOD, dtype=np.uint16)
    exponents = 118 + ((bits >> 8) & 3)
    return ((bits & 0x807F) | (exponents << 7)).astype("<u2").tobytes()


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama; the default is Llama 3 70B with its 30 shards of 4.6 GB."""

    layers: int = 80
    hidden: int = 8192
    intermediate: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocabulary: int = 128256
    shard_size: int = 5 * 10**9

    def scaled(self, factor: int) -> Llama:
        """Return the same number of layers and shards with every side `factor` times shorter."""
        return Llama(
            self.layers,
            self.hidden // factor,
            self.intermediate // factor,
            max(8, self.heads // factor),
            max(1, self.kv_heads // factor),
            self.vocabulary // factor,
            self.shard_size // factor**2,
        )

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes in the order of the model."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            for letter, rows in (("q", self.hidden), ("k", kv), ("v", kv), ("o", self.hidden)):
                yield f"{name}.self_attn.{letter}_proj.weight", (rows, self.hidden)
            yield f"{name}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{name}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{name}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{name}.input_layernorm.weight", (self.hidden,)
            yield f"{name}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def shards(self) -> list[dict[str, tuple[int, ...]]]:
        """Return the tensors of each shard, filled up one after the other."""
        shards: list[dict[str, tuple[int, ...]]] = [{}]
        filled = 0
        for name, shape in self.tensors():
            nbytes = 2 * math.prod(shape)
            if filled and filled + nbytes > self.shard_size:
                shards.append({})
                filled = 0
            shards[-1][name] = shape
            filled += nbytes
        return shards

    def files(self, checksums: Checksums | None = None) -> dict[str, Blob]:
        """Return every file of a repo of this model."""
        shards = self.shards()
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weights = {n: weights_of(shard) for n, shard in zip(names, shards, strict=True)}
        if checksums is not None:
            weights = checksums.known(weights)
        index = {
            "metadata": {"total_size": sum(b.size - len(b.header) for b in weights.values())},
            "weight_map": {t: n for n, shard in zip(names, shards, strict=True) for t in shard},
        }
        return {
            "config.json": _as_json(self.config()),
            "README.md": Bytes(b"---\nlicense: llama3\n---\n# A giant of noise\n"),
            "model.safetensors.index.json": _as_json(index),
            **weights,
        }


def weights_of(tensors: Mapping[str, tuple[int, ...]]) -> Weights:
    """Return the file of bfloat16 tensors of these shapes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Weights(len(text).to_bytes(8, "little") + text, 8 + len(text) + end)


@dataclass
class Checksums:
    """Checksums of giant files, kept in a file from one run to the next: taking them is work."""

    path: Path

    def known(self, files: Mapping[str, Weights]) -> dict[str, Weights]:
        """Return the files with their checksums, from before or taken now."""
        kept = json.loads(self.path.read_text()) if self.path.is_file() else {}
        keys = {name: hashlib.sha256(blob.header).hexdigest() for name, blob in files.items()}
        new = [name for name in files if keys[name] not in kept]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            taken = pool.map(lambda name: files[name].checksum(), new)
            kept |= {keys[name]: checksum for name, checksum in zip(new, taken, strict=True)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(kept, indent=1))
        return {n: Weights(blob.header, blob.size, kept[keys[n]]) for n, blob in files.items()}


def _as_json(value: object) -> Bytes:
    return Bytes(json.dumps(value, indent=2).encode())
