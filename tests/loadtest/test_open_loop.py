"""Requests leave when they are due, whatever the server does, and everything that it does is counted."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from loadtest.open_loop import OpenLoop, loop_factory
from loadtest.recorder import TIERS, Outcome, Recorder
from loadtest.traffic import Traffic
from tests.loadtest.fake_server import DONE, Exchange, FakeServer, Script, fake_server
from tests.loadtest.runs import shape, traffic_at

T = TypeVar("T")
LOOPS = [None, loop_factory()]
_loop = LOOPS[1]


@pytest.fixture(autouse=True, params=LOOPS, ids=["asyncio", "uvloop"])
def each_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop's transports and clock are not asyncio's."""
    monkeypatch.setattr(sys.modules[__name__], "_loop", request.param)


def in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=_loop) as runner:
        return runner.run(coroutine)


def run(
    script: Script, traffic: Traffic, *, drain: float = 20.0, max_open: int = 1000
) -> tuple[Recorder, FakeServer]:
    """One run against a fake server."""

    async def both() -> tuple[Recorder, FakeServer]:
        async with fake_server(script) as fake:
            to = fake.destination("poet", "clerk", max_open=max_open)
            loop = OpenLoop(traffic, shape(), to, drain)
            await loop.run()
            return loop.record, fake

    return in_loop(both())


async def answer(exchange: Exchange) -> None:
    exchange.answer()


def test_a_request_says_what_was_drawn_for_it() -> None:
    traffic = traffic_at(0.0, 0.01, output_len=4, num_tasks=2)
    _, fake = run(answer, traffic)

    first, second = sorted(fake.exchanges, key=lambda exchange: exchange.body["task"], reverse=True)
    assert (first.body["task"], second.body["task"]) == ("poet", "clerk")
    assert first.body["prompt"] == traffic.prompt(0, 50)
    assert first.body["max_tokens"] == 4
    assert first.body["ignore_eos"] is True
    assert first.body["temperature"] == 0.0
    assert first.head.startswith("POST /behind/generate HTTP/1.1\r\n")
    assert "authorization: Bearer k\r\n" in first.head


def test_every_request_leaves_although_the_server_answers_none() -> None:
    """A closed loop of any width below 300 would never send the last, and wait here for ever."""
    all_came = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        if exchange.number == 299:
            all_came.set()
        await all_came.wait()
        exchange.answer()

    record, fake = run(script, traffic_at(*(0.002 * n for n in range(300))))

    assert record.num_done == 300
    assert fake.num_connections == 300


def test_latency_counts_from_the_schedule_also_when_the_generator_is_late() -> None:
    """The server blocks the loop that both share: requests that were due meanwhile leave late."""

    async def script(exchange: Exchange) -> None:
        if exchange.number == 0:
            time.sleep(0.3)  # noqa: ASYNC251 - that is the fault
        exchange.answer()

    record, _ = run(script, traffic_at(0.0, 0.1, 0.2))

    late = record.lag[1:]
    assert (late > 0.05).all(), late
    latency = (record.first_token - record.traffic.at)[1:]
    assert (latency >= late).all()


def test_a_server_that_takes_one_at_a_time_shows_its_queue() -> None:
    turn = asyncio.Lock()

    async def script(exchange: Exchange) -> None:
        async with turn:
            await asyncio.sleep(0.05)
            exchange.answer()

    record, _ = run(script, traffic_at(*[0.0] * 6))

    latency = sorted((record.ended - record.traffic.at).tolist())
    assert all(got >= 0.05 * (place + 1) - 0.005 for place, got in enumerate(latency))


def test_tokens_and_gaps_are_counted_by_event() -> None:
    async def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.event(3)
        exchange.event(0)  # text that had been held back brings no token
        await exchange.writer.drain()
        await asyncio.sleep(0.03)
        exchange.event(2, prefix_tier="host")
        exchange.write(DONE)
        exchange.end()

    record, _ = run(script, traffic_at(0.0, output_len=5))

    assert record.num_output.tolist() == [5]
    assert record.gaps.total == 1
    assert (record.gaps.percentile(50) or 0) >= 0.029
    assert TIERS[record.tier[0]] == "host"


def test_an_event_that_comes_in_two_pieces_is_one() -> None:
    async def script(exchange: Exchange) -> None:
        exchange.begin()
        event = b"data: " + json.dumps({"token_ids": [1, 2], "prefix_tier": "disk"}).encode()
        for piece in (event[:9], event[9:] + b"\n", b"\n" + DONE):
            exchange.write(piece)
            await exchange.writer.drain()
            await asyncio.sleep(0.01)
        exchange.end()

    record, _ = run(script, traffic_at(0.0))

    assert record.num_done == 1
    assert TIERS[record.tier[0]] == "disk"


def test_what_is_not_a_whole_answer_is_counted_by_status_and_reason() -> None:
    async def script(exchange: Exchange) -> None:
        match exchange.body["task"]:
            case "busy":
                exchange.refuse("503 Service Unavailable", "overloaded")
            case "limited":
                exchange.refuse("429 Too Many Requests", "rate_limited")
            case "gone":
                exchange.refuse("404 Not Found", "model_not_found")
            case "proxy":
                exchange.begin("502 Bad Gateway")
                exchange.write(b"<html>")
                exchange.end()
            case "breaks":
                exchange.begin()
                exchange.event(1)
                exchange.write(b'data: {"error": {"code": "internal_error"}}\n\n' + DONE)
                exchange.end()
            case "short":
                exchange.begin()
                exchange.event(1, prefix_tier="device")
                exchange.end()
            case "cut":
                exchange.begin()
                exchange.event(1)
                await exchange.writer.drain()
                exchange.drop()

    names = ("busy", "limited", "gone", "proxy", "breaks", "short", "cut")

    async def both() -> Recorder:
        async with fake_server(script) as fake:
            traffic = traffic_at(*(0.001 * n for n in range(7)), num_tasks=7)
            loop = OpenLoop(traffic, shape(), fake.destination(*names), 20.0)
            await loop.run()
            return loop.record

    record = in_loop(both())

    lost = [reason for reason in record.reasons if reason.startswith("connection")]
    assert len(lost) == 1
    assert set(record.reasons) - set(lost) == {
        "503 overloaded",
        "429 rate_limited",
        "404 model_not_found",
        "502",
        "200, then internal_error",
        "200, but another number of tokens than asked for",
    }
    assert record.outcome.tolist() == [Outcome.REFUSED] * 2 + [Outcome.FAILED] * 5


def test_a_server_that_is_gone_fails_requests_and_not_the_run() -> None:
    async def both() -> Recorder:
        async with fake_server(answer) as fake:
            to = fake.destination()
        loop = OpenLoop(traffic_at(0.0, 0.01), shape(), to, 20.0)
        await loop.run()
        return loop.record

    record = in_loop(both())

    assert dict(record.reasons) == {"can not connect: ConnectionRefusedError": 2}


def test_answers_that_do_not_come_in_time_are_unfinished() -> None:
    async def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.event(1)
        await exchange.writer.drain()
        await asyncio.sleep(60)

    record, _ = run(script, traffic_at(0.0), drain=0.3)

    assert record.outcome.tolist() == [Outcome.UNFINISHED]
    assert record.reasons == {}
    assert record.num_output.tolist() == [1], "what came is kept"


def test_connections_are_used_again() -> None:
    record, fake = run(answer, traffic_at(0.0, 0.15, 0.3))

    assert record.num_done == 3
    assert fake.num_connections < 3


def test_a_kept_connection_that_the_server_closes_costs_no_request() -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.number == 1:
            assert exchange.connection == 1, "the second request came on the kept connection"
            exchange.drop()
        else:
            exchange.answer()

    record, fake = run(script, traffic_at(0.0, 0.3))

    assert record.num_done == 2
    assert fake.num_connections == 2


def test_without_a_descriptor_a_request_is_not_sent_and_says_so() -> None:
    all_came = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await all_came.wait()
        exchange.answer()

    async def both() -> Recorder:
        async with fake_server(script) as fake:
            loop = OpenLoop(traffic_at(0, 0, 0, 0), shape(), fake.destination(max_open=2), 20.0)
            running = asyncio.create_task(loop.run())
            while loop.record.num_sent < 4:  # noqa: ASYNC110 - a test may look
                await asyncio.sleep(0.01)
            all_came.set()
            await running
            return loop.record

    record = in_loop(both())

    assert record.num_done == 2
    assert dict(record.reasons) == {"not sent: 2 streams open, no descriptor left": 2}
