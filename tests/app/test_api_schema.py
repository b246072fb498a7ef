"""The whole API against its own document: whatever is sent, only documented answers come back."""

from __future__ import annotations

import httpx2
import pytest
import schemathesis
from api_tools import BODY, served
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture
def described(make_app):
    """The document of a served API that has one job, ended, so that its event stream ends, too."""
    app = make_app(plan_timeout_s=0.01)
    with served(app) as url:
        path = httpx2.post(f"{url}/v1/jobs", json=BODY).headers["location"]
        httpx2.post(f"{url}{path}/cancel")
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_only_documented_answers_come_back(described):
    operations = [found.ok() for found in described.get_all_operations()]
    assert {"POST /v1/jobs", "POST /v1/plans", "GET /readyz"} <= {it.label for it in operations}
    for operation in operations:
        _try(operation)


def _try(operation):
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def ask(case):
        answer = case.call_and_validate(checks=CHECKS, timeout=30)
        assert answer.status_code != 500, answer.text  # documented, and still never right

    ask()
