"""The page's files: all there, all our own, nothing inline, nothing from elsewhere."""

from __future__ import annotations

import re

import pytest
from api_tools import client_of

from app.routes.pages import WEB

FILES = sorted(path.name for path in WEB.iterdir())
SCRIPTS = {name: (WEB / name).read_text() for name in FILES if name.endswith(".js")}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


@pytest.fixture
def api(make_app):
    return client_of(make_app())


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_everything_a_page_loads_is_served(api, page):
    answer = api.get(page)
    assert answer.headers["content-type"].startswith("text/html")
    loaded = re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="([^"]+)"', answer.text)
    assert len(loaded) >= 3
    for path in loaded:
        assert api.get(path).status_code == 200, path


@pytest.mark.parametrize("name", FILES)
def test_files_are_served_with_their_types(api, name):
    answer = api.get(f"/web/{name}")
    assert answer.headers["content-type"].startswith(TYPES[name.rpartition(".")[2]])


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_loaded_from_elsewhere(name):
    text = (WEB / name).read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_nothing_is_inline(name):
    text = (WEB / name).read_text()
    assert not re.search(r"<script(?![^>]* src=)", text)
    assert "<style" not in text
    assert not re.search(r"\s(style|on\w+)=", text)


def test_modules_import_what_exists():
    for name, text in SCRIPTS.items():
        for target in re.findall(r'from "\./([^"]+)"', text):
            assert target in SCRIPTS, name


def test_text_never_becomes_markup():
    for name, text in SCRIPTS.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", text), name


def test_the_key_is_kept_for_the_session_only():
    for name, text in SCRIPTS.items():
        assert not re.search(r"localStorage|document\.cookie|indexedDB", text), name
