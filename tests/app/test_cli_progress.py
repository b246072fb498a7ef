"""Progress and tables: the figures are right, and each kind of output suits where it goes."""

from __future__ import annotations

import dataclasses
import doctest
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from cli_tools import environment

from app.cli import tables, units
from app.cli.client import Track
from app.cli.progress import LINE_EVERY_S, Pace, PlainLines, Snapshot
from pissa_core.plan import Estimate, Matrix, Plan, Refusal, ShardPlan


class Clock:
    """A clock that moves when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_units_are_as_their_docstrings_say() -> None:
    assert doctest.testmod(units).failed == 0


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (12_345_678, "12.3 MB"),
     (123_456_789, "123 MB"), (810_000_000_000, "810 GB"), (5 * 10**18, "5000 PB")],
)  # fmt: skip
def test_sizes_keep_three_digits(nbytes: int, text: str) -> None:
    assert units.size(nbytes) == text


def test_the_pace_counts_only_what_is_done_now() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.rate() is None
    assert pace.left_s(100) is None
    clock.now = 2.0
    pace.add(0)
    assert pace.rate() is None
    pace.add(100)
    assert pace.rate() == 50
    assert pace.left_s(25) == 0.5


def test_a_pace_of_a_moment_promises_nothing() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now = 1.0
    pace.add(10)
    assert pace.left_s(1000) is None, "one percent in a second says nothing"
    assert pace.left_s(190) == 19
    clock.now = 10.0
    assert pace.left_s(1000) == 1000


def test_plain_lines_come_with_phases_and_seconds_and_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    lines = PlainLines(clock)
    lines.show(Snapshot("planning"))
    for done in range(4):
        lines.show(Snapshot("converting", "matrices", done, 4))
    clock.now = LINE_EVERY_S
    lines.show(Snapshot("converting", "matrices", 3, 4))
    lines.show(Snapshot("converting", "matrices", 4, 4, 10, 10, 5.0, 0.0))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "planning",
        "converting: 0/4 matrices",
        "converting: 3/4 matrices",
        "converting: 4/4 matrices, 10 B of 10 B, 5 B/s, 0 s left",
    ]


def test_a_terminal_gets_a_live_bar_on_stderr() -> None:
    code = (
        "from app.cli.progress import Snapshot, display\n"
        "with display() as shown:\n"
        "    shown.show(Snapshot('converting', 'matrices', 3, 4, 10**6, 2 * 10**6, 5e5, 2.0))\n"
        "    shown.note('a line that [stays]')\n"
        "print('the result')\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**environment(), "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        assert process.stdout.read() == b"the result\n"
        drawn = _read_all(ours).decode()
    assert "3/4 matrices, 1.00 MB of 2.00 MB, 500 kB/s, 2 s left" in drawn
    assert "a line that [stays]" in drawn


def _read_all(fd: int) -> bytes:
    content = b""
    try:
        while chunk := os.read(fd, 4096):
            content += chunk
    except OSError:  # Linux's way to say that the other side of a terminal has gone
        pass
    finally:
        os.close(fd)
    return content


def test_a_jobs_pace_begins_at_the_first_look() -> None:
    track = Track()
    job: dict[str, Any] = {
        "status": "running",
        "phase": "shards",
        "eta_s": 4.0,
        "progress": {
            "matrices": {"done": 5, "total": 10},
            "bytes": {"done": 500, "total": 1000},
        },
    }
    first = track.snapshot(job)
    assert (first.label, first.done, first.total, first.rate) == ("shards", 5, 10, None)
    job["progress"]["bytes"]["done"] = 700
    assert track.snapshot(job).rate
    assert track.snapshot({**job, "status": "cancelling"}).label == "cancelling"


def _matrix(layer: int, name: str, shape: tuple[int, int], rank: int) -> Matrix:
    module = f"model.layers.{layer}.{name}"
    return Matrix(
        module=module,
        tensor=f"{module}.weight",
        shard="model.safetensors",
        dtype="BF16",
        shape=shape,
        start=0,
        stop=2 * shape[0] * shape[1],
        rank=rank,
        scaling=1.0,
        transposed=False,
        key_a="a",
        key_b="b",
    )


def _plan_of_70b() -> Plan:
    names = {
        "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192),
        "self_attn.v_proj": (1024, 8192), "self_attn.o_proj": (8192, 8192),
        "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
        "mlp.down_proj": (8192, 28672),
    }  # fmt: skip
    matrices = tuple(
        _matrix(layer, name, shape, 16) for layer in range(80) for name, shape in names.items()
    )
    return Plan(
        source="hf://org/name@abc",
        commit="abc",
        model_class="LlamaForCausalLM",
        names_from="transformers",
        config={},
        adapter_config={},
        shards=(ShardPlan("model.safetensors", 10**9, matrices),),
        carried=(),
        index=None,
        side_files=(),
        left_out=("pytorch_model.bin",),
        refused=(Refusal("lm_head", "tied_weight", "shared with embed_tokens"),),
        estimate=Estimate(140 * 10**9, 141 * 10**9, 10**9, 3 * 10**9, 142 * 10**9),
    )


def test_560_matrices_become_seven_lines(capsys: pytest.CaptureFixture[str]) -> None:
    public = _plan_of_70b().public()
    assert len(public["matrices"]) == 560
    groups = tables.group_matrices(public["matrices"])
    assert [number for _, number in groups] == [80] * 7
    tables.print_plan(public)
    shown = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in shown
    assert "8192 × 28672" in shown
    for words in ("tied_weight", "shared with embed_tokens", "140 GB", "about 3.00 GB",
                  "about 142 GB", "pytorch_model.bin", "LlamaForCausalLM"):  # fmt: skip
        assert words in shown


def test_refusals_that_differ_in_a_layer_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.{layer}.{proj}" for layer in range(80) for proj in ("q_proj", "k_proj")]
    refused = tuple(
        Refusal(name, "rank_too_large", f"rank 99 exceeds 64, of {name}.weight [64, 64]")
        for name in names
    )
    tables.print_plan(dataclasses.replace(_plan_of_70b(), refused=refused).public())
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if "rank_too" in line]
    assert [line[:3] for line in shown] == [
        ["model.layers.*.q_proj", "80", "rank_too_large"],
        ["model.layers.*.k_proj", "80", "rank_too_large"],
    ]
    words = "rank 99 exceeds 64, of model.layers.*.q_proj.weight [64, 64]"
    assert " ".join(shown[0][3:]) == words


def test_the_public_plan_has_the_fields_of_the_contract() -> None:
    public = _plan_of_70b().public()
    assert list(public) == [
        "source", "commit", "model_class", "names_from", "matrices", "refused", "left_out",
        "bytes", "peak_memory_bytes", "peak_disk_bytes", "peak_device_memory_bytes",
        "trainable_parameters", "divided", "notes",
    ]  # fmt: skip
    assert public["matrices"][0] == {
        "module": "model.layers.0.self_attn.q_proj",
        "tensor": "model.layers.0.self_attn.q_proj.weight",
        "shard": "model.safetensors",
        "shape": [8192, 8192],
        "rank": 16,
        "scaling": 1.0,
    }
    assert public["refused"] == [
        {"name": "lm_head", "code": "tied_weight", "reason": "shared with embed_tokens"}
    ]
    assert public["bytes"] == {"read": 140 * 10**9, "written": 141 * 10**9, "adapter": 10**9}


def test_a_table_in_a_pipe_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    long = "model." + "deep." * 60 + "q_proj"
    tables.print_table(("modules", "n"), [(long, "1")])
    assert long in capsys.readouterr().out
