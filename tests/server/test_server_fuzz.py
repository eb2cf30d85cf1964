"""Requests made up from our own OpenAPI document: no answer but documented ones, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from builders.serving import Running, running

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

# A request may be as the document says and still be refused: a model of another name, two fields that exclude each
# other. Everything else is checked: status codes, bodies and types as documented, no 5xx, bad input refused.
NOT_CHECKED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(queue=4) as found:  # which refuses an `n` that would take minutes
        yield found
        assert found.backend.state == "ok"
        assert found.idle()


def fuzz(server: Running, examples: int, **options: Any) -> None:
    """So many requests to each path, some as the document allows, some not."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) == 8
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode.is_negative and operation.method != "post":
                continue  # there is nothing to get wrong

            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), **options)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "tiny"  # other names are refused at once
                case.call_and_validate(excluded_checks=NOT_CHECKED)

            check()


def test_made_up_requests(server: Running) -> None:
    fuzz(server, 15, derandomize=True)


@pytest.mark.slow
def test_many_made_up_requests(server: Running) -> None:
    fuzz(server, 1000)
