"""Functions run on the engine thread between two steps, and nobody who waits for one is forgotten."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server.engine.calls import EngineCall, EngineCalls
from server.engine.tokenizer import Tokenizer
from server.errors import EngineStopped
from tests.server.engine.test_async_engine import Bench, collect, request, with_engine


def test_a_call_runs_on_the_engine_thread_and_its_result_comes_back(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.engine.run(lambda: threading.current_thread().name) == "engine"

    with_engine(tokenizer, scenario)


def test_a_call_that_fails_fails_alone(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.engine.submit(request("r"))
        with pytest.raises(ZeroDivisionError):
            await bench.engine.run(lambda: 1 // 0)
        assert (await collect(stream))[-1].finish_reason == "length"

    with_engine(tokenizer, scenario)


def test_no_call_runs_while_a_step_does(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.gate.clear()
        stream = bench.engine.submit(request("r"))
        await asyncio.sleep(0.05)  # the engine thread is inside a step now
        call = asyncio.create_task(bench.engine.run(lambda: "ran"))
        await asyncio.sleep(0.05)
        assert not call.done()
        bench.runner.gate.set()
        assert await call == "ran"
        await collect(stream)

    with_engine(tokenizer, scenario)


def test_a_stopped_engine_takes_no_call(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.engine.stop()
        with pytest.raises(EngineStopped):
            await bench.engine.run(lambda: None)

    with_engine(tokenizer, scenario)


def test_a_call_that_an_ending_engine_never_reached_is_let_go() -> None:
    async def scenario() -> None:
        posted: list[EngineCall] = []
        calls = EngineCalls(posted.append)
        waiting = asyncio.create_task(calls.run(lambda: None))
        await asyncio.sleep(0)
        calls.fail("the server is shutting down")
        with pytest.raises(EngineStopped, match="shutting down"):
            await waiting
        assert posted[0].future.done()

    asyncio.run(scenario())


def test_a_call_whose_caller_has_gone_does_not_run() -> None:
    async def scenario() -> None:
        posted: list[EngineCall] = []
        ran: list[int] = []
        waiting = asyncio.create_task(EngineCalls(posted.append).run(lambda: ran.append(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        posted[0].perform()
        assert ran == []

    asyncio.run(scenario())


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_call_that_is_let_go_while_it_runs_does_not_harm_the_engine_thread(
    succeeds: bool,
) -> None:
    def function() -> None:
        call.future.set_exception(EngineStopped("the drain is over"))
        if not succeeds:
            raise ValueError("and then this")

    call = EngineCall(function)
    call.perform()

    with pytest.raises(EngineStopped):
        call.future.result()
