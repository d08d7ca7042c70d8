"""The table of errors is complete, and what it makes of an exception leaks nothing."""

from __future__ import annotations

import inspect
import logging
from types import ModuleType

import pytest
from starlette.testclient import TestClient

import prefix_store.errors
import server.errors
import server.http.errors
from prefix_store.errors import ArtifactTooLarge, PrefixUnavailable, StoreFull
from server.errors import EngineOverloaded, EngineStopped, GenerationFailed
from server.http.error_responses import error_response
from server.http.errors import (
    ERROR_KINDS,
    INTERNAL,
    BodyTooLarge,
    BodyTooSlow,
    kind_of,
    message_of,
)
from tests.server.http.fakes import FakeEngine, make_app


def exceptions_of(module: ModuleType) -> set[type[Exception]]:
    return {
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Exception)
        and value.__module__ == module.__name__
    }


@pytest.mark.parametrize("module", [prefix_store.errors, server.errors, server.http.errors])
def test_every_exception_class_has_a_status(module: ModuleType) -> None:
    missing = exceptions_of(module) - ERROR_KINDS.keys()

    assert not missing


def test_a_code_means_one_thing() -> None:
    kinds = set(ERROR_KINDS.values())

    assert len({kind.code for kind in kinds}) == len(kinds)


def test_only_what_is_worth_repeating_says_when() -> None:
    for kind in ERROR_KINDS.values():
        assert (kind.retry_after is not None) == (kind.status == 503), kind


def test_an_answer_that_leaves_a_body_unread_closes_the_connection() -> None:
    unread = (BodyTooSlow("slow"), BodyTooLarge("x"), ArtifactTooLarge("x"), StoreFull("full"))
    for error in unread:
        for path in ("/generate", "/admin/v1/tasks/x"):
            assert error_response(error, path, "id").headers["connection"] == "close"
    assert "connection" not in error_response(EngineOverloaded(), "/generate", "id").headers
    for kind in ERROR_KINDS.values():
        assert kind.closes == (kind.status in (408, 413, 507)), kind


def test_a_class_without_an_entry_has_its_parents() -> None:
    class Special(EngineOverloaded):
        pass

    assert kind_of(Special()) is ERROR_KINDS[EngineOverloaded]
    assert kind_of(KeyError("x")) is INTERNAL


def test_foreign_exceptions_are_not_repeated() -> None:
    message = message_of(ValueError("/etc/secret 0x7f"), "abc123")

    assert "secret" not in message
    assert "abc123" in message


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineOverloaded("many wait"), 503, "overloaded"),
        (EngineStopped("stopping"), 503, "not_ready"),
        (GenerationFailed("a bad row"), 500, "generation_failed"),
        (PrefixUnavailable("gone"), 503, "prefix_unavailable"),
        (ZeroDivisionError("at 0x7f"), 500, "internal_error"),
    ],
)
def test_an_engine_error_becomes_a_status_and_a_body(
    error: Exception, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = TestClient(make_app(FakeEngine(refusal=error)))
    with caplog.at_level(logging.CRITICAL):
        response = client.post("/v1/completions", json={"model": "poet", "prompt": "x"})

    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert ("retry-after" in response.headers) == (status == 503)
    assert "0x7f" not in response.text


def test_an_unexpected_error_is_logged_with_the_id_that_the_client_got(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = TestClient(make_app(FakeEngine(refusal=ZeroDivisionError("why"))))

    response = client.post("/generate", json={"task": "poet", "prompt": "x"})

    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    assert any(
        response.headers["x-request-id"] in record.getMessage() and record.exc_info
        for record in caplog.records
    )
