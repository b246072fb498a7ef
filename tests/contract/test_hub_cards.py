"""A source card with metadata that the Hub refuses: found before any work, and left out."""

from __future__ import annotations

import pytest
import tinymodels
import yaml
from hub_tools import OUT, run
from places import contents_of

from pissa_core.adapters import folding_digest
from pissa_core.adapters.memory import MemorySink
from pissa_core.admission import check_plan
from pissa_core.engine import carry_out, convert
from pissa_core.fold.planning import make_fold_plan
from pissa_core.fold.work import Beside
from pissa_core.planning import make_plan
from pissa_core.report.metadata import FIELDS, refused_fields
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config

GOOD = {"license": "mit", "language": ["en"], "pipeline_tag": "text-generation", "tags": ["fine"]}
CPU = Runtime(device="cpu", slots=1)
CASES = {
    "a licence of its own": ({"license": "Ask us (we are friendly)"}, {"license"}),
    "a licence with a name": (
        {"license": "ACME v1", "license_name": "acme", "license_link": "LICENSE"},
        {"license", "license_name", "license_link"},
    ),
    "a language in full": ({"language": ["English"]}, {"language"}),
    "a tag too long": ({"tags": ["fine", "x" * 99]}, {"tags"}),
    "two at once": ({"license": "ACME", "tags": ["x" * 99]}, {"license", "tags"}),
}


@pytest.fixture
def repo(hub, tmp_path):
    return hub.create_repo("someone/card", tinymodels.save_model("llama", tmp_path / "model"))


def card_with(**metadata: object) -> bytes:
    return f"---\n{yaml.safe_dump({**GOOD, **metadata})}---\n# A card\n\nIts text.\n".encode()


def card_of(hub, repo_id: str = OUT) -> tuple[dict[str, object], str]:
    text = contents_of(hub, repo_id)["README.md"].decode()
    _, block, body = text.split("---", 2)
    return yaml.safe_load(block), body


@pytest.mark.parametrize("case", CASES)
def test_what_the_hub_refuses_is_left_out_and_said(hub, repo, open_hub, open_hub_sink, case):
    bad, refused = CASES[case]
    repo.commit({"README.md": card_with(**bad)})
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    source = open_hub("someone/card")
    plan = check_plan(make_plan(source, parse_config({"rank": 2})), source, sink, CPU)
    assert set(plan.card_without) == refused
    assert OUT not in hub.repos  # found while nothing was begun

    run(source, sink)

    metadata, body = card_of(hub)
    assert not refused & (metadata.keys() - {"tags"})
    kept = GOOD.keys() - refused - {"tags"}
    assert {name: metadata[name] for name in kept} == {name: GOOD[name] for name in kept}
    assert ("fine" in metadata["tags"]) == ("tags" not in refused)
    assert "pissa" in metadata["tags"]
    assert "The Hub refuses `" in body
    assert all(f"`{name}`" in body for name in refused)
    assert "Its text." in body


def test_a_good_card_is_asked_about_once_before_the_work_and_kept(
    hub, repo, open_hub, open_hub_sink
):
    repo.commit({"README.md": card_with()})
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    source = open_hub("someone/card")
    events = convert(source, sink, parse_config({"rank": 2}), CPU)
    next(events)
    assert len(hub.requests("/validate-yaml$")) == 1
    list(events)
    metadata, body = card_of(hub)
    assert {name: metadata[name] for name in GOOD if name != "tags"} == {
        name: value for name, value in GOOD.items() if name != "tags"
    }
    assert "fine" in metadata["tags"]
    assert "The Hub refuses" not in body


def test_a_bad_base_of_a_residuals_card_is_replaced_by_the_residual(
    hub, repo, open_hub, open_hub_sink, tmp_path
):
    token = hub.create_token("somebody")
    run(open_hub("someone/card"), open_hub_sink(OUT, token))
    card = contents_of(hub, OUT)["README.md"]
    assert b"base_model: someone/card" in card
    changed = card.replace(b"base_model: someone/card", b"base_model: /home/me/model")
    hub.repos[OUT].commit({"README.md": changed})
    residual, adapter = open_hub(OUT), open_hub(f"hf://{OUT}/pissa_init")
    plan = make_fold_plan(residual, adapter, lambda ref: open_hub(str(ref)))
    digest = folding_digest(residual, adapter, "somebody/plain")
    sink = open_hub_sink("somebody/plain", token, digest=digest)
    original = open_hub(plan.fold.original)
    list(carry_out(plan, residual, sink, CPU, beside=Beside(adapter, original)))
    metadata, body = card_of(hub, "somebody/plain")
    assert metadata["base_model"] == OUT
    assert "The Hub refuses `base_model`" in body


def test_a_folder_takes_any_card(repo, open_hub):
    repo.commit({"README.md": card_with(license="Ask us")})
    source = open_hub("someone/card")
    plan = check_plan(make_plan(source, parse_config({"rank": 2})), source, MemorySink(), CPU)
    assert plan.card_without == ()


def test_no_more_is_left_out_than_must_be():
    bad = {"language", "base_model"}
    asked = []

    def is_taken(without: tuple[str, ...]) -> bool:
        asked.append(without)
        return bad <= set(without)

    assert set(refused_fields(is_taken)) == bad
    assert len(asked) == 6
    assert refused_fields(lambda without: True) == ()
    assert refused_fields(lambda without: False) == FIELDS
