"""`pissa submit`: each kind's body as REST takes it, and what is refused before it is sent."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
from api_tools import client_of, served
from cli_tools import environment, pissa
from click.testing import CliRunner

from app.cli.submission import submit


@pytest.fixture
def asked(monkeypatch):
    """Return a function that submits, and gives back the body that would have been sent."""
    sent = []
    monkeypatch.setattr(
        "app.cli.submission._post_once", lambda service, body: sent.append(body) or {"id": "job_1"}
    )

    def run(*words):
        done = CliRunner().invoke(submit, words, obj={"debug": False}, standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        run.told = done.stderr
        return sent.pop()

    return run


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (
            ["org/name", "--rank", "4", "--out", "me/out"],
            {"kind": "base-to-pissa", "model": "org/name", "pissa": {"rank": 4},
             "output": "me/out"},
        ),
        (
            ["--kind", "pissa-to-lora", "--trained", "me/trained"],
            {"kind": "pissa-to-lora", "trained": "me/trained", "lora": {}},
        ),
        (
            ["--kind", "pissa-to-lora", "--trained", "a/b", "--initial", "c/d", "--rank", "8",
             "--tolerance", "0.01", "--uniform", "--out", "me/lora", "--private"],
            {"kind": "pissa-to-lora", "trained": "a/b", "initial": "c/d",
             "lora": {"rank": 8, "tolerance": 0.01, "uniform": True},
             "output": {"ref": "me/lora", "private": True}},
        ),
        (
            ["--kind", "pissa-to-base", "--residual", "a/b", "--adapter", "./c", "--out", "./d"],
            {"kind": "pissa-to-base", "residual": "a/b", "adapter": "./c", "output": "./d"},
        ),
        (
            ["--kind", "verify", "--original", "a/b", "--converted", "c/d"],
            {"kind": "verify", "original": "a/b", "converted": "c/d"},
        ),
    ],
)  # fmt: skip
def test_each_kind_has_the_body_that_rest_takes(asked, make_app, words, body):
    sent = asked(*words)
    assert sent == body
    answer = client_of(make_app(local_root=None)).post("/v1/jobs", json=sent)
    local = any(str(value).startswith("./") for value in body.values())
    assert answer.status_code == (422 if local else 202), answer.text


def test_a_name_that_is_a_folder_here_is_told_how_folders_are_written(asked, tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked("org/model")
    assert asked.told == (
        "note: org/model is asked of the Hub; a folder of the service's is ./org/model, below its "
        "PISSA_LOCAL_ROOT\n"
    )
    for meant in ("./org/model", "hf://org/model", "org/model@v1", "org/other"):
        asked(meant)
        assert asked.told == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--kind base-to-pissa needs MODEL"),
        (["--kind", "verify", "--original", "a/b"], "--kind verify needs --converted"),
        (["--kind", "pissa-to-base", "--adapter", "a/b"], "needs --residual"),
        (["a/b", "--kind", "verify", "--original", "a/b", "--converted", "c/d"], "has no MODEL"),
        (["a/b", "--trained", "c/d"], "--kind base-to-pissa has no --trained"),
        (["a/b", "--tolerance", "0.1"], "has no --tolerance"),
        (
            ["--kind", "pissa-to-lora", "--trained", "a/b", "--rounding", "peft"],
            "--kind pissa-to-lora has no --rounding\n",
        ),
        (
            [
                "--kind",
                "verify",
                "--original",
                "a/b",
                "--converted",
                "c/d",
                "--rank",
                "4",
                "--svd-method",
                "exact",
            ],
            "--kind verify has no --rank, --svd-method\n",
        ),
        (["--kind", "verify", "--original", "a/b", "--converted", "c/d", "--out", "e/f"], "--out"),
        (["--kind", "magic"], "'magic' is not one of"),
        (
            ["--kind", "pissa-to-lora", "--trained", "a/b", "--tolerance", "2"],
            "--tolerance: it must be",
        ),
        (["--kind", "pissa-to-base", "--residual", "a b", "--adapter", "c/d"], "'a b'"),
    ],
)
def test_what_does_not_belong_together_is_refused_before_anything_is_sent(words, sentence):
    done = pissa("submit", *words, env=environment(PISSA_URL="http://127.0.0.1:9"))
    assert done.returncode == 2
    assert done.stderr.startswith("error[invalid_")
    assert sentence in done.stderr


@contextmanager
def verified(make_app, worker, *, passed, **found):
    """Serve an API with a verification that has ended."""
    app = make_app()
    body = {"kind": "verify", "original": "a/b", "converted": "c/d"}
    job_id = client_of(app).post("/v1/jobs", json=body).json()["id"]
    worker.verify(job_id, passed=passed, **found)
    with served(app) as url:
        yield job_id, environment(PISSA_URL=url)


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_a_verification_that_did_not_pass_is_status_1(make_app, worker, passed, status):
    with verified(make_app, worker, passed=passed) as (job_id, env):
        done = pissa("watch", job_id, env=env)
        told = pissa("watch", job_id, "--json", env=env)
    assert (done.returncode, told.returncode) == (status, status), done.stderr
    assert ("passed" if passed else "NOT PASSED") in done.stdout
    assert f"/v1/jobs/{job_id}/manifest" in done.stdout
    assert "pissa fetch" not in done.stdout
    assert json.loads(told.stdout)["result"]["passed"] is passed


def test_a_failed_verification_tells_its_first_faults(make_app, worker):
    checks = [
        {"name": "files", "faults": [fault("a"), fault("b")], "more_faults": 3},
        {"name": "tensors", "faults": [], "more_faults": 0},
        {"name": "targets", "faults": [fault("c")], "more_faults": 0},
        {"name": "figures", "faults": [fault("d")], "more_faults": 0},
    ]
    found = {"checks": checks, "unchecked": ["the rest"]}
    with verified(make_app, worker, passed=False, **found) as (job_id, env):
        done = pissa("watch", job_id, env=env)
    assert done.stdout.partition("/manifest\n\n")[2] == (
        "fault[files] a: it is wrong\nfault[targets] c: it is wrong\n"
        "and 5 more, in the report under `checks`\nnot checked: the rest\n"
    )


def fault(where):
    return {"check": "files", "where": where, "what": "it is wrong"}


@pytest.mark.parametrize(
    ("body", "figures", "lines"),
    [
        (
            {"kind": "pissa-to-lora", "trained": "a/b"},
            {"ranks": [2, 8], "max_lost": 0.0123, "notes": ["a norm is left out"]},
            ["rank 2 to 8", "largest loss 0.0123 of a module's update"],
        ),
        (
            {"kind": "pissa-to-base", "residual": "a/b", "adapter": "c/d"},
            {"replaced": 0, "weights": 8, "equal_weights": 6, "max_ulps": 12345,
             "max_recombination_error": 0.00123},
            ["bit-equal to the original 75 % of 8 weights",
             "most that one weight is off 12,345 units of the last place "
             "(many where it is near zero)"],
        ),
    ],
)  # fmt: skip
def test_a_watched_job_of_each_kind_tells_what_matters(
    make_app, worker, tmp_path, body, figures, lines
):
    app = make_app()
    job_id = client_of(app).post("/v1/jobs", json=body).json()["id"]
    worker.complete(job_id, tmp_path / "out", {}, **figures)
    with served(app) as url:
        done = pissa("watch", job_id, env=environment(PISSA_URL=url))
    assert done.returncode == 0, done.stderr
    told = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert [line for line in lines if line not in told] == []
    assert ("note: a norm is left out\n" in done.stderr) is ("notes" in figures)
