"""The grammar of references, and the wall around the local root."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pissa_core.errors import InvalidReference, OutsideLocalRoot
from pissa_core.refs import HubRef, LocalRef, parse_ref, resolve_local


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", HubRef("gpt2")),
        ("org/name", HubRef("org/name")),
        ("org/name@main", HubRef("org/name", "main")),
        ("org/name@refs%2Fpr%2F1", HubRef("org/name", "refs/pr/1")),
        ("hf://gpt2", HubRef("gpt2")),
        ("hf://gpt2@v1/sub", HubRef("gpt2", "v1", "sub")),
        ("hf://org/name", HubRef("org/name")),
        ("hf://org/name/sub/folder", HubRef("org/name", None, "sub/folder")),
        ("hf://org/name@a%2Fb/sub/", HubRef("org/name", "a/b", "sub")),
        ("/abs/path", LocalRef("/abs/path")),
        ("./here", LocalRef("./here")),
        ("../up", LocalRef("../up")),
        ("~/home", LocalRef("~/home")),
        ("..", LocalRef("..")),
        ("file:/abs", LocalRef("/abs")),
        ("file:///with%20space", LocalRef("/with space")),
        ("file:relative", LocalRef("./relative")),
    ],
)
def test_reads_the_grammar(text, expected):
    assert parse_ref(text) == expected
    assert parse_ref(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("a\nb", "control characters"),
        ("a/b/c", "not a repo id"),
        ("-bad-/name", "not a repo id"),
        ("https://huggingface.co/gpt2", "only hf://"),
        ("s3://bucket/x", "only hf://"),
        ("org/name@", "not a revision"),
        ("org/name@a/b", "not a revision"),
        ("hf://org/name@", "no revision"),
        ("hf://org/name/../other", "leaves the repo"),
        ("file://host/path", "names the host"),
        ("file:", "no folder"),
    ],
)
def test_refuses_what_fits_neither_form(text, says):
    with pytest.raises(InvalidReference, match=says):
        parse_ref(text)


@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_refused(text):
    try:
        ref = parse_ref(text)
    except InvalidReference:
        return
    assert parse_ref(str(ref)) == ref


def test_without_a_root_a_path_starts_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_local(LocalRef("./model")) == tmp_path / "model"


@pytest.mark.parametrize("text", ["./model", "../root/model", "model/../model"])
def test_with_a_root_a_path_starts_there(tmp_path, text):
    root = tmp_path / "root"
    root.mkdir()
    assert resolve_local(LocalRef(text), root) == root / "model"


@pytest.mark.parametrize("text", ["..", "../other", "/etc", "./a/../../x", "./link", "./link/x"])
def test_nothing_outside_the_root_is_reached(tmp_path, text):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    with pytest.raises(OutsideLocalRoot, match="outside the folder"):
        resolve_local(LocalRef(text), root)


def test_a_tilde_is_no_home_for_strangers(tmp_path):
    assert resolve_local(LocalRef("~/x"), tmp_path) == tmp_path / "~" / "x"


def test_the_home_of_nobody_is_refused():
    with pytest.raises(InvalidReference, match=r"cannot be made an absolute path: .* home"):
        resolve_local(LocalRef("~nobody-of-this-name/model"))


def test_asking_loads_no_torch():
    code = "import sys, pissa_core.spec, pissa_core.refs, pissa_core.errors\n"
    code += "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_from_folder_to_folder_no_client_of_the_hub_is_loaded():
    code = "import sys, pissa_core.engine, pissa_core.adapters.local\n"
    code += "assert 'huggingface_hub.hf_api' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
