"""How commands end: exit statuses, errors with their codes, and streams kept apart."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cli_tools import PISSA, environment, free_port, pissa

from app.cli.client import _failure
from app.cli.errors import ExitStatus, Interrupted, on_interrupt, report
from app.cli.options import settings
from pissa_core.errors import RepoNotFound, error_from

COMMANDS = (
    "plan", "convert", "serve", "worker", "submit", "jobs", "watch", "cancel", "resume", "fetch"
)  # fmt: skip


def test_help_lists_every_command() -> None:
    done = pissa("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S", done.stdout, re.MULTILINE), command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = pissa(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: pissa {command}")


@pytest.mark.parametrize("command", ["plan", "convert", "submit"])
def test_help_lists_every_config_option(command: str) -> None:
    shown = pissa(command, "--help").stdout
    assert [setting.flag for setting in settings() if f"{setting.flag} " not in shown] == []
    assert "--config " in shown


def test_the_version_is_the_packages() -> None:
    from pissa_core import __version__

    assert pissa("--version").stdout == f"pissa, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nonsense"], "invalid_request", "No such command 'nonsense'"),
        (["plan"], "invalid_request", "Missing argument 'MODEL'"),
        (["convert", "org/name"], "invalid_request", "Missing option '--out'"),
        (["plan", "org/name", "--rnk", "4"], "invalid_request", "No such option"),
        (["plan", "org/name", "--rank", "0"], "invalid_config", "rank"),
        (["plan", "org/name", "--rank", "four"], "invalid_config", "rank"),
        (["plan", "org/name", "--svd-method", "magic"], "invalid_config", "svd.method"),
        (
            ["plan", "org/name", "--lora-alpha", "0"],
            "invalid_config",
            "lora_alpha: it must be greater than 0",
        ),
        (["jobs", "--limit", "201"], "invalid_request", "--limit"),
        (["plan", "org/name", "--target-modules", "(a"], "invalid_config", "target_modules"),
        (["plan", "org/name", "--rank-pattern", "{"], "invalid_config", "--rank-pattern"),
        (["plan", "https://a.example/b"], "invalid_reference", "is a URL"),
        (["convert", "org/name", "--out", "a/b/c"], "invalid_reference", "'a/b/c'"),
        (["convert", "a/b", "--out", "./o", "--device", "tpu"], "invalid_request", "'tpu'"),
        (["convert", "a/b", "--out", "./o", "--slots", "0"], "invalid_request", "--slots"),
        (["convert", "a/b", "--out", "./o", "--memory-budget", "big"], "invalid_request", "'big'"),
        (["submit", "org/name", "--rank", "-1"], "invalid_config", "rank"),
        (["submit", "/a", "--out", "file:"], "invalid_reference", "file:"),
        (["fetch", "../job", "./d"], "invalid_request", "../job"),
        (["watch", "a/b"], "invalid_request", "a/b"),
    ],
)
def test_what_the_command_line_shows_is_refused_with_status_2(
    tmp_path: Path, arguments: list[str], code: str, words: str
) -> None:
    done = pissa(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"error[{code}]: ")
    assert words in first
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ['{"rank": 4, "rnak": 5}', "rank: [1"])
def test_a_config_file_is_judged_before_anything_is_opened(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    done = pissa("plan", "org/name", "--config", file)
    assert done.returncode == 2
    assert done.stderr.startswith("error[invalid_config]: ")


def test_no_arguments_show_the_help_on_stderr() -> None:
    done = pissa()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: pissa ")


@pytest.mark.parametrize("where", [("--debug", "plan", "a/b"), ("plan", "a/b", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(where: tuple[str, ...]) -> None:
    done = pissa(*where, "--rank", "0")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "error[invalid_config]: " in done.stderr


def test_a_service_that_is_not_there_is_status_1_with_a_hint() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = pissa("jobs", env=environment(PISSA_URL=url))
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error[service_unreachable]: no answer from the service at {url}"
    )
    assert "\nhint: start one with `pissa serve`" in done.stderr


def test_an_answer_lost_on_the_way_makes_no_second_job() -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as door:

        def lose_the_first() -> None:
            for answer in (b"", _ACCEPTED):
                connection, _ = door.accept()
                with connection:
                    asked.append(connection.recv(1 << 16))
                    connection.sendall(answer)

        service = threading.Thread(target=lose_the_first, daemon=True)
        service.start()
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        done = pissa("submit", "org/name", env=environment(PISSA_URL=url))
        service.join(10)
    assert (done.returncode, done.stdout) == (0, "job_1\n"), done.stderr
    keys = [re.search(rb"(?i)^idempotency-key: (\S+)", one, re.MULTILINE) for one in asked]
    first, second = [key and key[1] for key in keys]
    assert first == second is not None


_ACCEPTED = (
    b"HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 15\r\n"
    b'Connection: close\r\n\r\n{"id": "job_1"}'
)


@pytest.mark.parametrize("url", ["ftp://there", "localhost:8000", "http://", "http://[::1"])
def test_a_bad_service_address_is_status_2(url: str) -> None:
    done = pissa("jobs", env=environment(PISSA_URL=url))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error[invalid_request]: PISSA_URL ")


def test_a_key_that_cannot_be_sent_is_not_shown() -> None:
    done = pissa("jobs", env=environment(PISSA_API_KEY="s€cret"))
    assert done.returncode == 2
    assert "PISSA_API_KEY" in done.stderr
    assert "cret" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "a/b", "--rank", "0"], ["jobs"], ["submit", "a/b"]]
)
def test_what_needs_no_arithmetic_loads_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from app.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'celery'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy))\n"
    )
    url = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(PISSA_URL=url),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("heavy: []\n")


def test_a_command_brings_along_no_other() -> None:
    code = (
        "import sys\n"
        "from app.cli import pissa\n"
        "pissa.get_command(None, 'plan')\n"
        "others = {'app.cli.client', 'app.cli.submission', 'httpx2', 'huggingface_hub'}\n"
        "print(sorted(others & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_command_nearly_right_is_suggested() -> None:
    done = pissa("conver", "./model", env=environment())
    assert done.returncode == 2
    assert "Did you mean 'convert'?" in done.stderr


def test_a_reader_of_stdout_who_has_enough_causes_no_traceback() -> None:
    with subprocess.Popen(
        [PISSA, "plan", "--help"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_an_unforeseen_error_is_internal_and_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report(EOFError("cut short"), debug=False) == ExitStatus.FAILED
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error[internal]: EOFError: cut short"
    assert said[1].startswith("hint: ")


def test_an_interruption_says_what_became_of_the_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Interrupted) as caught, on_interrupt("interrupted: go on"):
        raise KeyboardInterrupt
    assert report(caught.value, debug=False) == ExitStatus.INTERRUPTED
    assert capsys.readouterr().err == "interrupted: go on\n"


def test_an_error_crosses_a_process_by_its_code() -> None:
    known = error_from("repo_not_found", "there is no such repo", "look again")
    assert isinstance(known, RepoNotFound)
    assert known.as_dict() == {
        "code": "repo_not_found",
        "message": "there is no such repo",
        "hint": "look again",
    }
    foreign = error_from("of_tomorrow", "something new")
    assert (foreign.code, foreign.hint) == ("of_tomorrow", None)


@pytest.mark.parametrize(
    ("code", "resumable"), [("worker_lost", True), ("rank_too_large", False), ("internal", True)]
)
def test_a_resume_is_advised_only_where_it_may_help(code: str, resumable: bool) -> None:
    error = {"code": code, "message": "why", "hint": None}
    told = _failure({"id": "job_1", "status": "failed", "error": error})
    assert (told.code, told.message) == (code, "why")
    assert ("pissa resume job_1" in (told.hint or "")) is resumable
