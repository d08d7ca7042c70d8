"""One line for each request: its figures are in it, and nothing that a client said or was told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.errors import StoreFailed
from server.errors import EngineOverloaded, GenerationFailed
from server.log import JsonFormatter
from server.types import GenerationRequest
from tests.server.http.fakes import ADMIN, ADMIN_KEY, FakeEngine, failed, make_app, words

PROMPT = "canary-prompt-5f1c0a"
OUTPUT = "canary-output-8d2e4b"
KEY = "canary-key-77aa01bc"
SALT = "canary-salt-91c3d5"


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Without those of the test client, which logs what it sends."""
    return [record for record in caplog.records if not record.name.startswith("httpx")]


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(JsonFormatter().format(record)) for record in ours(caplog)]


def of_requests(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [line for line in lines(caplog) if "route" in line]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_request_leaves_one_line_with_its_figures(
    client: TestClient, caplog: pytest.LogCaptureFixture, streaming: bool
) -> None:
    caplog.set_level(logging.INFO)
    body = {"model": "poet", "prompt": "hello", "stream": streaming, "n": 2}
    answer = client.post("/v1/completions", json=body)

    [line] = of_requests(caplog)
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["task"], line["version"]) == ("poet", 2)
    assert line["digest"] == answer.headers["x-prefixd-digest"]
    assert (line["prompt_tokens"], line["output_tokens"]) == (5, 6)
    assert line["finish_reasons"] == ["length", "length"]
    assert (line["queue_seconds"], line["first_token_seconds"]) == (0.001, 0.002)
    assert line["request_bytes"] == len(answer.request.content)
    assert line["response_bytes"] == len(answer.content)
    assert 0 < line["seconds"] < 60


def test_a_refused_request_has_a_line_too_and_an_unknown_path_or_method_no_name(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client.get("/admin/v1/tasks")
    client.post("/canary-path", content=b"x")
    client.request("BREW", "/v1/models")
    client.post("/v1/completions", json={"model": "nobody-knows", "prompt": "x"})

    found = [(line["method"], line["route"], line["status"]) for line in of_requests(caplog)]
    assert found == [
        ("GET", "/admin/v1/tasks", 401),
        ("POST", "unmatched", 404),
        ("other", "/v1/models", 405),
        ("POST", "/v1/completions", 404),
    ]
    text = json.dumps(lines(caplog))
    assert not any(word in text for word in ("canary-path", "BREW", "nobody-knows"))


def _crash(_: GenerationRequest) -> list[Any]:
    raise ZeroDivisionError


def _ways(engine: FakeEngine) -> dict[str, Callable[[], None]]:
    """Each makes the next requests end in another way."""

    def refuse(error: Exception) -> Callable[[], None]:
        return lambda: setattr(engine, "refusal", error)

    def answer(script: Callable[[GenerationRequest], Any]) -> Callable[[], None]:
        return lambda: setattr(engine, "script", script)

    return {
        "whole": answer(lambda r: words(r, OUTPUT, OUTPUT)),
        "failed": answer(lambda r: [*words(r, OUTPUT, "x")[:1], failed(r, "a bad row")]),
        "crash in the stream": answer(lambda r: [*words(r, OUTPUT, "x")[:1], ZeroDivisionError()]),
        "crash": answer(_crash),
        "overloaded": refuse(EngineOverloaded("too many")),
        "ours": refuse(GenerationFailed("one row")),
        "store": refuse(StoreFailed("the disk is gone")),
    }


@pytest.mark.parametrize("way", sorted(_ways(FakeEngine())))
def test_nothing_of_prompts_answers_and_keys_is_in_any_log_or_metric(
    caplog: pytest.LogCaptureFixture, way: str
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = FakeEngine()
    _ways(engine)[way]()
    client = TestClient(make_app(engine, api_key=KEY), raise_server_exceptions=False)
    body = {"model": "poet", "task": "poet", "prompt": PROMPT, "cache_salt": SALT, "user": SALT}
    keys = [{"authorization": f"Bearer {KEY}"}, {"authorization": f"Bearer wrong-{KEY}"}, {}]
    for headers in keys:
        for path in ("/v1/completions", "/generate"):
            for change in ({}, {"stream": True}, {"temperature": PROMPT}, {"model": [PROMPT]}):
                client.post(path, json={**body, **change}, headers=headers)
            malformed = json.dumps(body)[:-1].encode()
            client.post(
                path, content=malformed, headers=headers | {"content-type": "application/json"}
            )
            client.post(f"{path}?key={KEY}", content=malformed, headers=headers)

    text = "".join(JsonFormatter().format(record) + str(record.exc_info) for record in ours(caplog))
    shown = text + client.get("/metrics", headers=ADMIN).text
    assert ours(caplog)
    secrets = (PROMPT, OUTPUT, KEY, SALT, ADMIN_KEY)
    assert [secret for secret in secrets if secret in shown] == []
