"""The OpenAPI document is true: whatever it allows is answered as it says, and never with a failure of the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.server.served import Served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def brief(start: Callable[..., Served]) -> Served:
    """One whose answers are short, however many tokens a request allows."""
    return start("ernie_thinking", "--max-model-len", "192", "--served-model-name", "tiny")


@pytest.fixture(scope="module")
def document(brief: Served) -> Any:
    return schemathesis.openapi.from_url(f"{brief.url}/openapi.json", headers=brief.headers)


checks = schemathesis.checks
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/chat/completions/render"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/tokenize"),
    ("POST", "/v1/detokenize"),
    ("POST", "/resume"),
    ("POST", "/abort_requests"),
]


def check(served: Served, operation: Any, examples: int) -> None:
    """Send what the document allows and what it does not, and hold the answers against it.

    One judge is left out, `positive_data_acceptance`: what a schema cannot say (that a prompt fits the context, that two fields
    exclude each other) is refused with a 400, and rightly so.
    """
    left_out = [one for one in checks.CHECKS.get_all() if one.__name__ == "positive_data_acceptance"]

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    @given(case=operation.as_strategy() | operation.as_strategy(schemathesis.GenerationMode.NEGATIVE))
    def answers_conform(case: Any) -> None:
        response = case.call(headers=served.headers, timeout=30)
        case.validate_response(response, excluded_checks=left_out, headers=served.headers)

    answers_conform()


def test_the_document_lists_all_of_these(document: Any) -> None:
    found = {(one.ok().method.upper(), one.ok().path) for one in document.get_all_operations()}
    assert found >= set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_route_keeps_to_the_document(document: Any, brief: Served, method: str, path: str) -> None:
    check(brief, document[path][method], 15)


def test_pausing_keeps_to_the_document(document: Any, brief: Served) -> None:
    try:
        check(brief, document["/pause"]["POST"], 15)
    finally:
        assert brief.post("/resume", {}).status_code == 200


@pytest.mark.slow
def test_every_route_keeps_to_the_document_at_length(document: Any, brief: Served) -> None:
    everything = [one.ok() for one in document.get_all_operations()]
    for operation in [one for one in everything if one.path != "/pause"]:  # which the rest would wait behind
        check(brief, operation, 150)
