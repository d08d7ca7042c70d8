"""How a server is asked: bounded, patient with a busy one, and only for the version that was meant."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from server.cli_client import CommandFailed
from trainer import served_completions
from trainer.served_completions import (
    MAX_CONCURRENT,
    ServedVersion,
    complete_through_server,
    model_len_behind,
)

VERSION = ServedVersion("task", 3, "sha256:" + "a" * 64)
Handler = Callable[[httpx2.Request], httpx2.Response]
Serve = Callable[[Handler], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Puts a function in the place of the server."""
    client = httpx2.Client

    def put(handler: Handler) -> None:
        transport = httpx2.MockTransport(handler)
        monkeypatch.setattr(httpx2, "Client", functools.partial(client, transport=transport))

    monkeypatch.setattr(served_completions, "_LONGEST_WAIT_SECONDS", 0.0)
    return put


def answer(request: httpx2.Request, digest: str = VERSION.digest) -> httpx2.Response:
    """The prompt's first token as the text."""
    body: Any = json.loads(request.content)
    text = str(body["prompt"][0])
    return httpx2.Response(200, json={"choices": [{"text": text}], "prefixd": {"digest": digest}})


def complete(count: int) -> list[str]:
    prompts = [(number,) for number in range(count)]
    limits = range(7, 7 + count)
    return complete_through_server(
        "http://server", {"authorization": "x"}, VERSION, prompts, limits
    )


def test_each_prompt_goes_greedily_as_token_ids_to_the_named_version(serve: Serve) -> None:
    bodies: list[Any] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        assert (request.url.path, request.headers["authorization"]) == ("/v1/completions", "x")
        bodies.append(json.loads(request.content))
        return answer(request)

    serve(handler)
    assert complete(2) == ["0", "1"]
    common = {"model": "task@v3", "temperature": 0.0}
    assert sorted(bodies, key=lambda body: body["prompt"]) == [
        common | {"prompt": [0], "max_tokens": 7},
        common | {"prompt": [1], "max_tokens": 8},
    ]


def test_answers_come_in_the_order_of_the_prompts_and_few_at_a_time(serve: Serve) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def handler(request: httpx2.Request) -> httpx2.Response:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005 if json.loads(request.content)["prompt"][0] % 2 else 0.0)
        with lock:
            running -= 1
        return answer(request)

    serve(handler)
    assert complete(100) == [str(number) for number in range(100)]
    assert 1 < most <= MAX_CONCURRENT


def test_a_busy_server_is_asked_again(serve: Serve) -> None:
    num_asked = 0

    def handler(request: httpx2.Request) -> httpx2.Response:
        nonlocal num_asked
        num_asked += 1
        busy = httpx2.Response(503, headers={"retry-after": "1"})
        return busy if num_asked < 4 else answer(request)

    serve(handler)
    assert complete(1) == ["0"]
    assert num_asked == 4


def test_a_server_that_stays_busy_is_given_up_with_its_reason(serve: Serve) -> None:
    body = {"error": {"message": "the queue is full"}}
    serve(lambda _: httpx2.Response(503, json=body))
    with pytest.raises(CommandFailed, match="503: the queue is full") as caught:
        complete(1)
    assert caught.value.status == 503


@pytest.mark.parametrize("wait", ["Wed, 21 Oct 2026 07:28:00 GMT", "-5", "nan", "inf", "soon", ""])
def test_a_wait_that_is_no_number_of_seconds_is_a_short_one(serve: Serve, wait: str) -> None:
    """HTTP has dates there too, and a proxy may put one."""
    statuses = iter([503, 200])

    def handler(request: httpx2.Request) -> httpx2.Response:
        if next(statuses) == 503:
            return httpx2.Response(503, headers={"retry-after": wait})
        return answer(request)

    serve(handler)
    assert complete(1) == ["0"]


@pytest.mark.parametrize(
    "response",
    [
        httpx2.Response(200, text="<html>It works!</html>"),
        httpx2.Response(200, json=[]),
        httpx2.Response(200, json={"choices": [{"text": "a"}]}),
        httpx2.Response(200, json={"choices": [], "prefixd": {"digest": VERSION.digest}}),
    ],
)
def test_a_server_that_is_no_prefixd_is_named_as_such(
    serve: Serve, response: httpx2.Response
) -> None:
    serve(lambda _: response)
    with pytest.raises(CommandFailed, match="http://server: expected an answer of prefixd"):
        complete(1)


def test_an_answer_of_other_bytes_is_no_answer(serve: Serve) -> None:
    serve(lambda request: answer(request, "sha256:" + "b" * 64))
    with pytest.raises(CommandFailed, match=r"task@v3: expected .*aaa, got one of .*bbb"):
        complete(1)


def test_a_server_that_can_not_be_reached_is_named(serve: Serve) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    serve(handler)
    with pytest.raises(CommandFailed, match=r"can not reach http://server.*refused"):
        complete(1)


def test_the_room_behind_a_version_is_what_the_server_says(serve: Serve) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        assert (request.url.path, request.headers["authorization"]) == ("/v1/models/task@v3", "x")
        return httpx2.Response(200, json={"max_model_len": 496})

    serve(handler)
    assert model_len_behind("http://server", {"authorization": "x"}, VERSION) == 496
    serve(lambda _: httpx2.Response(404, json={"error": {"message": "there is no task"}}))
    with pytest.raises(CommandFailed, match="task@v3: 404: there is no task"):
        model_len_behind("http://server", {}, VERSION)
