"""A client that leaves, or stops reading, gives its place back. Spoken in bare ASGI, where timing is ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.http import sse
from tests.server.http.fakes import FakeEngine, make_app, words

Message = dict[str, Any]


def never_ending(engine: FakeEngine, *texts: str) -> None:
    engine.script = lambda request: words(request, *texts, "never")[: len(texts)]


async def converse(
    engine: FakeEngine,
    streaming: bool,
    gone: asyncio.Event,
    on_send: Callable[[Message], Awaitable[None]],
    path: str = "/v1/completions",
) -> None:
    """One request whose client leaves when `gone` is set."""
    body = {"model": "poet", "task": "poet", "prompt": "x", "n": 2, "stream": streaming}
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    app: Any = make_app(engine)
    async with asyncio.timeout(5):
        await app(scope, receive, on_send)


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_leaving_a_stream_closes_the_request(path: str) -> None:
    engine = FakeEngine()
    never_ending(engine, "a", "b")

    async def run() -> list[Message]:
        gone, sent = asyncio.Event(), []

        async def on_send(message: Message) -> None:
            sent.append(message)
            if len(sent) == 3:
                gone.set()

        await converse(engine, True, gone, on_send, path)
        return sent

    sent = asyncio.run(run())

    assert engine.streams[0].closed
    assert sent[0]["status"] == 200
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


@pytest.mark.parametrize("streaming", [True, False])
def test_leaving_before_the_first_token_closes_the_request(streaming: bool) -> None:
    engine = FakeEngine()
    never_ending(engine)

    async def run() -> None:
        gone = asyncio.Event()

        async def on_send(_: Message) -> None:
            pass

        asyncio.get_running_loop().call_later(0.05, gone.set)
        await converse(engine, streaming, gone, on_send)

    asyncio.run(run())

    assert engine.streams[0].closed


@pytest.mark.parametrize("streaming", [True, False])
def test_leaving_while_the_prompt_is_tokenized_ends_the_request(streaming: bool) -> None:
    engine = FakeEngine(tokenizer_hangs=True)

    async def run() -> list[Message]:
        gone, sent = asyncio.Event(), []

        async def on_send(message: Message) -> None:
            sent.append(message)

        asyncio.get_running_loop().call_later(0.05, gone.set)
        await converse(engine, streaming, gone, on_send)
        return sent

    sent = asyncio.run(run())

    assert sent[0]["status"] == 499
    assert (engine.num_tokenizing, engine.requests) == (0, [])


def test_leaving_while_an_answer_is_collected_closes_the_request() -> None:
    engine = FakeEngine()
    never_ending(engine, "a", "b")

    async def run() -> list[Message]:
        gone, sent = asyncio.Event(), []

        async def on_send(message: Message) -> None:
            sent.append(message)

        asyncio.get_running_loop().call_later(0.05, gone.set)
        await converse(engine, False, gone, on_send)
        return sent

    sent = asyncio.run(run())

    assert engine.streams[0].closed
    assert sent[0]["status"] == 499


def test_a_reader_that_stalls_loses_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STALL_SECONDS", 0.05)
    engine = FakeEngine()

    async def run() -> None:
        async def on_send(message: Message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        await converse(engine, True, asyncio.Event(), on_send)

    asyncio.run(run())

    assert engine.streams[0].closed


def test_a_cancelled_handler_closes_the_request() -> None:
    engine = FakeEngine()
    never_ending(engine, "a")

    async def run() -> None:
        began = asyncio.Event()

        async def on_send(_: Message) -> None:
            began.set()

        task = asyncio.create_task(converse(engine, True, asyncio.Event(), on_send))
        await began.wait()  # and not for a while: a busy machine may take longer to begin
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())

    assert engine.streams[0].closed
