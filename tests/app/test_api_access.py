"""Who may ask, and what every answer carries: keys, loopback, headers, problem documents."""

from __future__ import annotations

import pytest
from api_tools import BODY, HOME, client_of
from starlette.testclient import TestClient

KEYS = ("key-of-anna", "key-of-bert")


@pytest.fixture
def keyed(make_app):
    return make_app(api_keys=KEYS)


def code_of(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Basic a2V5LW9mLWFubmE=", "key-of-anna"]
)
def test_without_a_right_key_nothing_is_told(keyed, header):
    api = client_of(keyed)
    headers = {"Authorization": header} if header else {}
    for method, path in [("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("POST", "/v1/plans")]:
        answer = api.request(method, path, headers=headers)
        assert code_of(answer) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert "wrong" not in answer.text


def test_health_and_page_need_no_key(keyed):
    api = client_of(keyed)
    for path in ("/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/"):
        assert api.get(path).status_code == 200, path


def test_a_key_sees_its_own_jobs_only(keyed):
    anna, bert = (client_of(keyed, key) for key in KEYS)
    path = anna.post("/v1/jobs", json=BODY).headers["location"]
    assert anna.get(path).status_code == 200
    assert len(anna.get("/v1/jobs").json()["jobs"]) == 1
    assert bert.get("/v1/jobs").json()["jobs"] == []
    for method, end in [("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("DELETE", "")]:
        assert code_of(bert.request(method, path + end)) == (404, "not_found")
    assert anna.get(path).json()["status"] == "queued"


def test_idempotency_keys_of_two_owners_are_two(keyed):
    anna, bert = (client_of(keyed, key) for key in KEYS)
    headers = {"Idempotency-Key": "mine"}
    first = anna.post("/v1/jobs", json=BODY, headers=headers)
    second = bert.post("/v1/jobs", json={**BODY, "model": "org/b"}, headers=headers)
    assert (first.status_code, second.status_code) == (202, 202)


def test_without_keys_only_loopback_names_are_served(make_app):
    app = make_app()
    for base in ("http://localhost", HOME, "http://[::1]:8000"):
        api = TestClient(app, base_url=base)
        assert api.get("/v1/jobs").status_code == 200, base
    for base in ("http://example.org", "http://10.0.0.7:8000", "http://127.0.0.1.evil.org"):
        assert code_of(TestClient(app, base_url=base).get("/v1/jobs")) == (403, "forbidden"), base


def test_without_keys_a_name_that_resolves_here_is_refused(make_app):
    answer = client_of(make_app()).get("/v1/jobs", headers={"Host": "rebound.example.org"})
    assert code_of(answer) == (403, "forbidden")


def test_without_keys_another_site_s_page_cannot_submit(make_app):
    api = client_of(make_app())
    answer = api.post("/v1/jobs", json=BODY, headers={"Origin": "https://evil.example.org"})
    assert code_of(answer) == (403, "forbidden")
    assert api.post("/v1/jobs", json=BODY, headers={"Origin": HOME}).status_code == 202


def test_every_answer_carries_security_headers_and_a_request_id(make_app):
    api = client_of(make_app())
    for path in ("/", "/docs", "/web/app.js", "/livez", "/v1/jobs", "/nowhere"):
        headers = api.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "unsafe-inline" not in headers["content-security-policy"] or path == "/docs"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert len(headers["x-request-id"]) == 32


def test_a_request_id_is_taken_over_if_it_is_one(make_app):
    api = client_of(make_app())
    assert api.get("/livez", headers={"X-Request-ID": "a-1"}).headers["x-request-id"] == "a-1"
    odd = api.get("/livez", headers={"X-Request-ID": "a b" * 50}).headers["x-request-id"]
    assert len(odd) == 32


def test_an_unknown_route_and_method_are_problems(make_app):
    api = client_of(make_app())
    assert code_of(api.get("/nowhere")) == (404, "not_found")
    assert code_of(api.get("/v1/jobs/")) == (404, "not_found")
    wrong = api.put("/v1/jobs")
    assert code_of(wrong) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET, POST"


def test_a_crash_is_a_problem_without_its_trace(make_app, caplog):
    app = make_app()

    def crash() -> None:
        raise RuntimeError("the secret inside")

    app.add_api_route("/crash", crash)
    answer = client_of(app).get("/crash")
    assert code_of(answer) == (500, "internal")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["hint"]
    assert "the secret inside" in caplog.text


def test_the_document_describes_every_route_with_examples(make_app):
    document = client_of(make_app(api_keys=KEYS)).get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    seen = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            seen.add((method.upper(), path))
            assert operation["summary"]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            assert body is None or body["examples"]
            for status, answer in operation["responses"].items():
                content = answer.get("content", {})
                if int(status) >= 400:
                    assert list(content) == ["application/problem+json"], (path, status)
                if "application/json" in content:
                    assert content["application/json"]["example"], (path, status)
            if path.startswith("/v1/"):
                assert operation["security"] == [{"HTTPBearer": []}]
                assert {"401", "403", "422", "500", "503"} <= set(operation["responses"])
    assert seen >= {
        ("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/jobs/{job_id}"),
        ("DELETE", "/v1/jobs/{job_id}"), ("POST", "/v1/jobs/{job_id}/cancel"),
        ("POST", "/v1/jobs/{job_id}/resume"), ("GET", "/v1/jobs/{job_id}/events"),
        ("GET", "/v1/jobs/{job_id}/manifest"), ("GET", "/v1/jobs/{job_id}/files"),
        ("GET", "/v1/jobs/{job_id}/files/{path}"), ("POST", "/v1/plans"), ("GET", "/livez"),
        ("GET", "/readyz"), ("GET", "/metrics"),
    }  # fmt: skip


def test_every_reference_inside_the_document_leads_somewhere(make_app):
    document = client_of(make_app()).get("/openapi.json").json()

    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    names = set(references(document))
    assert "#/components/schemas/BaseToPissa" in names
    for name in names:
        assert name.removeprefix("#/components/schemas/") in document["components"]["schemas"]
