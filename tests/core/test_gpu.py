"""What a GPU does: the same certificates, the same bytes twice, and room made where it is short.

The way there and back is gone with the GPU there is, if there is one, and always with one that is
none, see `pretend_gpu`.
"""

from __future__ import annotations

import weakref

import pytest
import tinymodels
import torch
from conversions import checksums, convert_to, course_of, fold_to, verified
from lora_tools import to_lora
from pretend_gpu import pretended_gpu
from spectra import SPECTRA, missed_energy

from pissa_core import footprint, split
from pissa_core.certify import certify
from pissa_core.errors import OutOfMemory
from pissa_core.events import MatrixDone
from pissa_core.fold import arithmetic
from pissa_core.fold.arithmetic import fold_in, folding_bytes
from pissa_core.footprint import working_bytes
from pissa_core.lora.adapter import WEIGHTS
from pissa_core.runtime import Runtime, computing, resolve
from pissa_core.shortage import ran_out_of_memory
from pissa_core.spec import SvdConfig
from pissa_core.split import split_principal
from pissa_core.svd import operator, truncated_svd

REAL = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
)


def real(test):
    """Mark a test that says nothing without a GPU."""
    for mark in REAL:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tinymodels.save_model(name, folder / name, dtype=dtype)
        for name, dtype in (("llama", "bf16"), ("gpt2", "fp32"))
    }


@pytest.fixture(params=["pretended", pytest.param("real", marks=REAL)])
def gpu(request, models):
    """What `pretended_gpu` gives; None for a real one."""
    if request.param == "real":
        yield None
    else:
        with pretended_gpu() as pretended:
            yield pretended


@real
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_certificate_is_false(spectrum, dtype):
    for m, n in ((700, 520), (520, 700)):
        W = SPECTRA[spectrum](m, n, 8).to(dtype)
        wishes = {"method": "auto", "tolerance": 1e-4, "niter": 0, "seed": 1}
        found = truncated_svd(W.cuda(), 8, **wishes)
        missed = missed_energy(W, found.U.cpu(), found.S.cpu(), found.Vt.cpu())
        assert missed <= certify(found, torch.zeros_like(found.S), 0.0).missed <= 1.2e-4


@pytest.mark.parametrize("rounding", ["faithful", "peft"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_bytes_whatever_the_slots(gpu, models, name, rounding, tmp_path):
    method = "auto" if rounding == "faithful" else "exact"
    config = {"rank": 4, "rounding": rounding, "svd": {"method": method}}
    outputs = []
    for slots in (1, 4):
        out = tmp_path / str(slots) / "out"
        course = list(course_of(models[name], out, config, device="cuda", slots=slots))
        assert {row["device"] for row in rows_of(course)} == {"cuda"}
        assert verified(models[name], out)["passed"]
        outputs.append(checksums(out)["model.safetensors"])
    assert outputs[0] == outputs[1]
    assert gpu is None or gpu.late


def test_there_and_back(gpu, models, tmp_path):
    pair = tmp_path / "pair"
    convert_to(models["llama"], pair, {"rank": 4}, device="cuda")
    back = fold_to(pair, pair / "pissa_init", tmp_path / "back", device="cuda")
    assert back["matrices"]
    assert all(row["recombination_error"] < 4e-3 for row in back["matrices"])
    exact = to_lora(pair / "pissa_init", tmp_path / "lora", device="cuda")
    squeezed = to_lora(pair / "pissa_init", tmp_path / "small", device="cuda", rank=2)
    assert exact["matrices"]
    assert squeezed["matrices"]
    assert all(row["lost"] < 1e-6 for row in squeezed["matrices"])  # nothing was trained


def test_the_budget_is_that_of_the_device(gpu):
    free, _ = torch.cuda.mem_get_info()
    assert 0 < resolve(Runtime(device="cuda")).budget < free
    assert resolve(Runtime(device="cuda", memory_budget=12345)).budget == 12345


def test_what_does_not_fit_the_device_is_done_on_the_cpu(gpu, models, tmp_path, caplog):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        course = list(course_of(models["llama"], tmp_path / "out", {"rank": 4}, device="cuda"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert {row["device"] for row in rows_of(course)} == {"cpu"}
    assert "going on with 1" in caplog.text
    assert "it is done on the CPU" in caplog.text


def rows_of(course):
    return [event.row for event in course if isinstance(event, MatrixDone)]


def test_where_memory_runs_out_in_company_there_is_one_slot_less(models, tmp_path, caplog):
    config = {"rank": 4}
    with pretended_gpu() as gpu:
        alone = tmp_path / "alone" / "out"
        list(course_of(models["llama"], alone, config, device="cuda", slots=1))
        gpu.limit = gpu.peak
        crowded = tmp_path / "crowded" / "out"
        course = list(course_of(models["llama"], crowded, config, device="cuda", slots=8))
        assert gpu.used == 0
    assert {row["device"] for row in rows_of(course)} == {"cuda"}
    assert "memory ran out with up to 8 matrices in flight; going on with 7" in caplog.text
    assert checksums(alone)["model.safetensors"] == checksums(crowded)["model.safetensors"]


def test_where_memory_runs_out_an_adapter_is_converted_on_the_cpu(models, tmp_path, caplog):
    convert_to(models["llama"], tmp_path / "pair", {"rank": 4})
    adapter = tmp_path / "pair" / "pissa_init"
    with pretended_gpu() as gpu:
        gpu.limit = 0
        to_lora(adapter, tmp_path / "gpu", device="cuda", rank=2)
    to_lora(adapter, tmp_path / "cpu", rank=2)
    assert "does not fit cuda:0; it is done on the CPU" in caplog.text
    assert checksums(tmp_path / "gpu")[WEIGHTS] == checksums(tmp_path / "cpu")[WEIGHTS]


def test_memory_is_given_back_however_it_ends(gpu):
    torch.cuda.empty_cache()
    before = None if gpu else torch.cuda.memory_reserved()
    with pytest.raises(RuntimeError, match="size"), computing(Runtime(device="cuda")) as resolved:
        torch.zeros(1 << 26, device=resolved.device) + torch.zeros(3, device=resolved.device)
    if gpu is None:
        assert torch.cuda.memory_reserved() == before  # cuBLAS keeps what it has
    else:
        assert gpu.emptied > 1


def test_float32_means_float32(gpu):
    torch.set_float32_matmul_precision("high")
    try:
        resolve(Runtime(device="cuda"))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def exactly(monkeypatch):
    """Promise nothing to spare, so that the device's own terms are needed."""
    for module in (footprint, operator, split, arithmetic):
        monkeypatch.setattr(module, "GPU_PANEL_BYTES", 2 << 20)
    monkeypatch.setattr(operator, "GPU_GRAM_PANEL", 64)
    for module in (footprint, arithmetic):
        monkeypatch.setattr(module, "PANEL_BYTES", 4 << 10)
        monkeypatch.setattr(module, "_SLACK", 0)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "rank"), [(1400, 1200, 4), (500, 2400, 24)])
def test_what_is_promised_of_a_fold_is_enough(m, n, rank, dtype):
    generator = torch.Generator().manual_seed(0)
    R, B, A = (torch.randn(*shape, generator=generator) for shape in ((m, n), (m, rank), (rank, n)))
    with pretended_gpu() as gpu:
        fold_in(R.to(dtype).cuda(), B.cuda(), A.cuda(), scaling=1.0)
        promised = folding_bytes(m, n, rank, dtype.itemsize, compared=True, device="cuda")
        assert 0.3 * promised < gpu.peak <= promised


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("rounding", ["faithful", "peft"])
@pytest.mark.parametrize("method", ["auto", "lowrank", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "rank"), [(6000, 100, 4), (500, 2400, 24), (760, 2000, 48)])
def test_what_is_promised_of_the_devices_memory_is_enough(m, n, rank, dtype, method, rounding):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    with pretended_gpu() as gpu:
        split_principal(
            W.cuda(),
            rank,
            scaling=1.0,
            svd=SvdConfig(method=method, niter=1),
            seed=0,
            rounding=rounding,
            adapter_dtype=torch.float32,
            overwrite=True,
        )
        promised = working_bytes(m, n, rank, dtype.itemsize, method, rounding, device="cuda")
        assert 0.2 * promised < gpu.peak <= promised


@pytest.mark.parametrize(
    ("sentence", "out_of_memory"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_libraries_say_of_the_devices_memory_counts_as_well(sentence, out_of_memory):
    assert ran_out_of_memory(RuntimeError(sentence)) is out_of_memory


def test_what_an_error_before_the_last_one_held_is_let_go_as_well():
    held = []

    def run_out():
        matrix = torch.ones(1)
        held.append(weakref.ref(matrix))
        raise RuntimeError("CUDA error: out of memory")

    def work():
        try:
            try:
                run_out()
            except RuntimeError:
                torch.empty(1 << 60)  # asked for to say more of the first
        except RuntimeError as error:
            raise OutOfMemory("at a matrix") from error

    with pytest.raises(OutOfMemory) as caught:
        work()
    assert held[0]() is not None
    assert ran_out_of_memory(caught.value)
    assert held[0]() is None


def test_the_pretended_gpu_forgives_less_than_a_real_one():
    pageable, total = torch.ones(4), torch.zeros(())
    with pretended_gpu() as gpu:
        there = pageable.cuda()
        with pytest.raises(RuntimeError, match="same device"):
            there + pageable
        with pytest.raises(RuntimeError, match="same device"):
            total += there.sum()
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([total, there.sum()])
        assert there * torch.tensor(2.0) is not None  # a number may come from the CPU
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="pageable"):
            pageable.to(torch.device("cuda"), non_blocking=True)
        back = torch.empty_like(there, device="cpu", pin_memory=True)
        back.copy_(there, non_blocking=True)
        assert torch.isnan(back).all()
        gpu.stream.synchronize()
        assert torch.equal(back, pageable)
        back.to(torch.device("cuda"), non_blocking=True)
        back.zero_()
        with pytest.raises(RuntimeError, match="changed before it was copied"):
            gpu.stream.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            elsewhere = torch.zeros(4, device="cuda").add_(1)
        with pytest.raises(RuntimeError, match="another stream"):
            elsewhere + there
        gpu.limit = gpu.used
        with pytest.raises(torch.OutOfMemoryError):
            there * 2
