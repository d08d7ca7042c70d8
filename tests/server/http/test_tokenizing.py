"""What waits for the tokenizer is bounded by its length, and what is refused is told and counted."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from server.errors import EngineOverloaded
from server.http import tokenizing
from server.http.app import create_app
from server.http.tokenizing import Conversation, Prompt, TokenizerQueue
from tests.server.http.fakes import FakeEngine, make_app, make_services


def test_room_is_given_back_however_the_work_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "MAX_WAITING_CHARS", 20)
    queue = TokenizerQueue()
    with pytest.raises(ZeroDivisionError), queue.room_for(["x" * 10], ""):
        raise ZeroDivisionError
    with queue.room_for(["x" * 6], ""):
        with pytest.raises(EngineOverloaded), queue.room_for(["xxx", "yy"], ""):
            pass
        with queue.room_for(["x" * 4], ""):
            pass


def test_a_tenant_that_fills_its_half_leaves_the_other_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizing, "MAX_WAITING_CHARS", 20)
    queue = TokenizerQueue()
    with queue.room_for(["x" * 10], "acme"):
        with pytest.raises(EngineOverloaded), queue.room_for(["x"], "acme"):
            pass
        with (
            queue.room_for(["x" * 10], "beta"),
            pytest.raises(EngineOverloaded),
            queue.room_for(["x"], ""),
        ):
            pass


def test_what_nothing_else_waits_before_always_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "MAX_WAITING_CHARS", 20)
    with TokenizerQueue().room_for(["x" * 100], ""):
        pass


@pytest.mark.parametrize(
    "prompt", [(1, 2, 3), Conversation(({"role": "user", "content": ""},)), "xxx"]
)
def test_token_ids_and_turns_without_text_take_room_too(
    monkeypatch: pytest.MonkeyPatch, prompt: Prompt
) -> None:
    monkeypatch.setattr(tokenizing, "MAX_WAITING_CHARS", 20)
    queue = TokenizerQueue()
    with (
        queue.room_for(["x" * 8], ""),
        pytest.raises(EngineOverloaded),
        queue.room_for([prompt], ""),
    ):
        pass


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/detokenize", {"tokens": [5] * 6}), ("/v1/completions", {"prompt": [5] * 6, "echo": True})],
)
def test_ids_that_are_to_become_text_wait_in_the_same_room(
    monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr(tokenizing, "MAX_WAITING_CHARS", 20)
    app = make_app(FakeEngine())
    client = TestClient(app)
    body = {"model": "poet", **fields}

    with app.state.tokenizer_queue.room_for(["x" * 6], ""):
        assert client.post(path, json=body).status_code == 503
    assert client.post(path, json=body).status_code == 200


def test_what_names_no_model_is_not_made_into_text(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(engine, "detokenize", None)  # not to be called
    body = {"model": "nobody", "prompt": [5], "echo": True}

    assert TestClient(make_app(engine)).post("/v1/completions", json=body).status_code == 404


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_a_prompt_beyond_the_bound_is_503_before_it_is_tokenized(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(tokenizing, "MAX_WAITING_CHARS", 10)
    engine = FakeEngine(tokenizer_hangs=True)
    services = make_services(engine)
    body = {"model": "poet", "task": "poet", "prompt": "x" * 6}

    async def run() -> httpx2.Response:
        transport = httpx2.ASGITransport(create_app(services))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(client.post(path, json=body))
            while not engine.num_tokenizing:  # noqa: ASYNC110 - the fake counts, no more
                await asyncio.sleep(0)
            second = await client.post(path, json=body)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            return second

    response = asyncio.run(run())

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    assert response.headers["retry-after"] == "1"
    counted = {"endpoint": path.rpartition("/")[2], "outcome": "rejected", "task": "poet"}
    value = services.metrics.registry.get_sample_value("prefixd_requests_total", counted)
    assert value == 1
    assert engine.num_tokenizing == 0
