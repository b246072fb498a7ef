"""Memory that runs out after a weight was overwritten, and what is kept for the next matrix."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import tinymodels
from conversions import checksums, convert_to

from pissa_core import decompose, headstart
from pissa_core.buffers import Buffers

WEIGHTS = ("model.safetensors", "pissa_init/adapter_model.safetensors")


def weights_in(folder):
    found = checksums(folder)
    return {path: found[path] for path in WEIGHTS}


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 is stored transposed
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_matrix_that_is_begun_again_is_read_again(tmp_path, monkeypatch, name, dtype):
    model = tinymodels.save_model(name, tmp_path / "model", dtype=dtype)
    convert_to(model, tmp_path / "undisturbed", {"rank": 4}, slots=1)
    split, tried, lock = decompose.split_principal, Counter(), threading.Lock()
    both = threading.Barrier(2)

    def runs_out_first(W, *args, seed, **wishes):
        done = split(W, *args, seed=seed, **wishes)
        with lock:
            tried[seed] += 1
            first = len(tried) <= 2 and tried[seed] == 1
        if first:
            both.wait(30)
            if min(tried) == seed:
                raise MemoryError
        return done

    monkeypatch.setattr(decompose, "split_principal", runs_out_first)
    convert_to(model, tmp_path / "disturbed", {"rank": 4}, slots=2)
    assert sum(tried.values()) == len(tried) + 1
    assert weights_in(tmp_path / "disturbed") == weights_in(tmp_path / "undisturbed")


def test_what_is_kept_lies_within_what_those_in_flight_leave_of_the_largest(tmp_path, monkeypatch):
    held = []

    class Watched(Buffers):
        def expect(self, nbytes, spare):
            held.append(spare)
            super().expect(nbytes, spare)

    monkeypatch.setattr(decompose, "Buffers", Watched)
    model = tinymodels.save_model("llama", tmp_path / "model")
    convert_to(model, tmp_path / "out", {"rank": 4}, slots=2)
    assert len(held) == 14
    assert min(held) >= 0


def test_a_head_start_keeps_nothing_once_the_matrices_turn_has_come(tmp_path, monkeypatch):
    from pissa_core.adapters.local import LocalSource
    from pissa_core.runtime import Resolved, torch
    from pissa_core.spec import parse_config

    monkeypatch.setattr(headstart, "usable_cores", lambda: 3)
    source = LocalSource(tinymodels.save_model("llama", tmp_path / "model"))
    resolved = Resolved(torch.device("cpu"), 2, 1 << 30)
    begun = headstart.HeadStart(source, parse_config({"rank": 4}), resolved)
    futures = list(begun._futures.values())
    assert futures
    begun.close()
    for future in futures:
        if not future.cancelled():
            future.result(60)
    assert begun._buffers._free == []
