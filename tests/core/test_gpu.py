"""What a GPU does: the same certificates, the same bytes twice, and room made where it is short."""

from __future__ import annotations

import pytest
import tinymodels
import torch
from conversions import checksums, course_of
from spectra import SPECTRA, missed_energy

from pissa_core.certify import certify
from pissa_core.events import MatrixDone
from pissa_core.runtime import Runtime, resolve
from pissa_core.svd import truncated_svd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_certificate_is_false(spectrum, dtype):
    for m, n in ((700, 520), (520, 700)):
        W = SPECTRA[spectrum](m, n, 8).to(dtype)
        wishes = {"method": "auto", "tolerance": 1e-4, "niter": 0, "seed": 1}
        found = truncated_svd(W.cuda(), 8, **wishes)
        missed = missed_energy(W, found.U.cpu(), found.S.cpu(), found.Vt.cpu())
        assert missed <= certify(found, torch.zeros_like(found.S), 0.0).missed <= 1.2e-4


def test_the_same_bytes_whatever_the_slots(tmp_path):
    model = tinymodels.save_model("llama", tmp_path / "model", dtype="bf16")
    outputs = []
    for slots in (1, 4):
        out = tmp_path / str(slots) / "out"
        list(course_of(model, out, {"rank": 4}, device="cuda", slots=slots))
        outputs.append(checksums(out)["model.safetensors"])
    assert outputs[0] == outputs[1]


def test_the_budget_is_that_of_the_device():
    free, _ = torch.cuda.mem_get_info()
    assert 0 < resolve(Runtime(device="cuda")).budget < free
    assert resolve(Runtime(device="cuda", memory_budget=12345)).budget == 12345


def test_what_does_not_fit_the_device_is_done_on_the_cpu(tmp_path, caplog):
    model = tinymodels.save_model("llama", tmp_path / "model", dtype="bf16")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        events = list(course_of(model, tmp_path / "out", {"rank": 4}, device="cuda", slots=3))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    rows = [event.row for event in events if isinstance(event, MatrixDone)]
    assert {row["device"] for row in rows} == {"cpu"}
    assert "going on with 1" in caplog.text
    assert "it is decomposed on the CPU" in caplog.text
