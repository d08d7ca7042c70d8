"""Deadlines, full queues, slow readers, a store that does not answer: on a real event loop and a real engine thread."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from typing import Any, cast

import pytest

from server.engine.core import StepResult
from server.engine.output_processor import OutputProcessor
from server.engine.prefetch import STORE_HANGS
from server.engine.request_stream import MAX_WAITING, RequestStream
from server.engine.tokenizer import Tokenizer
from server.errors import DeadlineExceeded, EngineOverloaded
from server.types import FinishReason, GenerationRequest, RequestOutput
from tests.server.engine import test_async_engine
from tests.server.engine.test_async_engine import (
    SCRIPT,
    Bench,
    collect,
    ref,
    request,
    text_of,
    with_engine,
)


def until(request: GenerationRequest, seconds: float) -> GenerationRequest:
    return dataclasses.replace(request, deadline=time.monotonic() + seconds)


# ---- deadlines -----------------------------------------------------------------------------------


def test_a_request_ends_at_its_deadline_with_the_text_that_it_has(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.step_seconds = 0.01
        outputs = await collect(bench.engine.submit(until(request("r", max_tokens=70), 0.2)))

        assert outputs[-1].finish_reason is FinishReason.DEADLINE
        count = outputs[-1].num_output_tokens
        assert 0 < count < 70
        assert [t for o in outputs for t in o.token_ids] == list(
            (tokenizer.encode(SCRIPT) * 9)[:count]
        )
        assert [s.outcome for s in bench.observer.requests] == ["deadline"]
        await bench.idle()
        assert sum(s.num_decode_tokens for s in bench.observer.steps) < 70, "the engine went on"

    with_engine(tokenizer, scenario)


def test_text_that_was_held_back_is_given_out_at_the_deadline(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.step_seconds = 0.05
        held = tokenizer.decode(tokenizer.encode(SCRIPT)[:90]) + "never"
        stream = bench.engine.submit(until(request("r", max_tokens=70, stop=(held[:100],)), 0.3))
        outputs = await collect(stream)

        count = outputs[-1].num_output_tokens
        assert [o.text for o in outputs[:-1]] == [""] * (len(outputs) - 1)
        assert outputs[-1].text == tokenizer.decode(tokenizer.encode(SCRIPT)[:count])
        await bench.idle()

    with_engine(tokenizer, scenario)


def test_a_request_whose_time_is_over_in_the_queue_never_runs(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.gate.clear()
        busy = [bench.engine.submit(request(str(i))) for i in range(4)]
        late = bench.engine.submit(until(request("late", n=2), 0.05))
        outputs = await collect(late)
        bench.runner.gate.set()

        assert [(o.finish_reason, o.text) for o in outputs] == [(FinishReason.DEADLINE, "")] * 2
        assert [len(await collect(stream)) for stream in busy] == [8] * 4
        await bench.idle()
        assert sum(s.num_decode_tokens for s in bench.observer.steps) == 4 * 7

    with_engine(tokenizer, scenario)


def test_a_request_whose_time_is_over_already_is_not_taken(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        with pytest.raises(DeadlineExceeded):
            bench.engine.submit(until(request("r"), -0.1))
        assert len(await collect(bench.engine.submit(until(request("r"), 20)))) == 8

    with_engine(tokenizer, scenario)


def test_a_request_that_ends_in_time_is_not_ended_again(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        streams = [bench.engine.submit(until(request(str(i)), 0.1)) for i in range(2)]
        await streams[1].aclose()
        assert len(await collect(streams[0])) == 8
        await asyncio.sleep(0.15)

        assert sorted(s.outcome for s in bench.observer.requests) == ["cancelled", "length"]
        await bench.idle()

    with_engine(tokenizer, scenario)


# ---- cancelling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["waiting", "prefix", "prefill", "decode", "ended"])
def test_a_cancelled_request_gives_its_blocks_back_within_two_steps(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """The one under way when the client left, and the next. To cancel again changes nothing."""
    used: list[int] = []  # own blocks of requests after each step

    async def scenario(bench: Bench) -> None:
        healthy = bench.engine._core.step

        def step(inbox: list[Any]) -> StepResult:
            result = healthy(inbox)
            used.append(bench.blocks.num_used - bench.prefixes.num_blocks)
            return result

        monkeypatch.setattr(bench.engine._core, "step", step)
        bench.runner.step_seconds = 0.02
        prompt = (1,) * (50 if phase == "prefill" else 3)  # a step takes 16 tokens
        prefix = ref("hangs") if phase == "prefix" else None
        stream = bench.engine.submit(request("r", prompt=prompt, prefix=prefix, max_tokens=20))
        if phase in ("decode", "ended"):
            await anext(stream)
        elif phase != "waiting":
            await asyncio.sleep(0.03)
        if phase == "ended":
            await collect(stream)
        for _ in range(2):
            await stream.aclose()
            bench.engine.abort("r")
        num_steps = len(used)
        await bench.idle()
        await asyncio.sleep(0.1)

        assert all(blocks == 0 for blocks in used[num_steps + 1 :])
        assert len(used) <= num_steps + 3
        assert len(bench.observer.requests) == 1
        assert len(await collect(bench.engine.submit(request("next")))) == 8
        test_async_engine.STORE_ANSWERS.set()

    test_async_engine.STORE_ANSWERS.clear()
    with_engine(tokenizer, scenario)


# ---- queues --------------------------------------------------------------------------------------


def test_prompts_that_wait_are_bounded_by_their_tokens(
    tokenizer: Tokenizer,
) -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine._limits = dataclasses.replace(bench.engine._limits, max_num_queued_tokens=50)
        bench.runner.gate.clear()
        first = bench.engine.submit(request("first", prompt=(1,) * 60))
        with pytest.raises(EngineOverloaded, match="60 prompt tokens are waiting"):
            bench.engine.submit(request("x"))
        await first.aclose()
        streams = [bench.engine.submit(request(str(i), prompt=(1,) * 25)) for i in range(2)]
        with pytest.raises(EngineOverloaded, match="max_num_queued_tokens"):
            bench.engine.submit(request("x", prompt=(1,)))
        bench.runner.gate.set()
        await anext(streams[0])
        await anext(streams[1])
        streams.append(bench.engine.submit(request("y", prompt=(1,) * 50)))

        for stream in streams:
            assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH
        await bench.idle()

    with_engine(tokenizer, scenario)


# ---- slow readers --------------------------------------------------------------------------------


def test_a_reader_that_is_far_behind_gets_it_all_in_few_pieces(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.engine.submit(request("r", max_tokens=40, n=4, ignore_eos=True))
        await bench.idle()
        outputs = await collect(stream)

        assert len(outputs) <= MAX_WAITING + 4
        script = list(tokenizer.encode(SCRIPT) * 4)[:40]
        for index in range(4):
            mine = [o for o in outputs if o.index == index]
            assert [t for o in mine for t in o.token_ids] == script
            assert text_of(mine, index) == tokenizer.decode(script)
            assert [o.finish_reason for o in mine if o.finish_reason] == [FinishReason.LENGTH]
            assert mine[-1].num_output_tokens == 40

    with_engine(tokenizer, scenario)


def test_a_reader_that_is_very_far_behind_costs_little_more_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else 100,000 tokens would be copied 100,000 times, on the event loop."""
    num_copied = 0
    join = RequestOutput.followed_by

    def counted(first: RequestOutput, later: RequestOutput) -> RequestOutput:
        nonlocal num_copied
        num_copied += len(first.token_ids) + len(later.token_ids)
        return join(first, later)

    monkeypatch.setattr(RequestOutput, "followed_by", counted)

    async def scenario() -> list[RequestOutput]:
        stream = RequestStream(cast("OutputProcessor", None), lambda _: None)
        for count in range(5000):
            stream.put(RequestOutput("r", 0, "a", (count,), count + 1))
        assert sum(map(len, stream._waiting)) <= MAX_WAITING + 14
        stream.put(RequestOutput("r", 0, "b", (), 5000, FinishReason.LENGTH))
        stream.end()
        return [output async for output in stream]

    outputs = asyncio.run(scenario())

    assert [token for output in outputs for token in output.token_ids] == list(range(5000))
    assert "".join(output.text for output in outputs) == "a" * 5000 + "b"
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert num_copied < 5000 * 30


def test_every_field_of_an_increment_is_joined_on_purpose() -> None:
    """A new one that is an increment, and is not added up in `followed_by`, would be lost for slow readers."""
    added_up = {"text", "token_ids", "logprobs", "prompt_logprobs"}
    latest = {
        *("request_id", "index", "num_output_tokens", "finish_reason", "stop_reason", "error"),
        *("prefix_tier", "timings", "num_cached_tokens"),
    }
    assert {f.name for f in dataclasses.fields(RequestOutput)} <= added_up | latest
    first = RequestOutput("r", 0, "a", (1,), 1)
    joined = first.followed_by(RequestOutput("r", 0, "b", (2,), 2, FinishReason.STOP))
    assert joined == RequestOutput("r", 0, "ab", (1, 2), 2, FinishReason.STOP)


# ---- a store that does not answer, an engine that dies -----------------------------------------------


def test_while_the_store_hangs_resident_tasks_are_served_and_cold_ones_refused_in_two_seconds(
    tokenizer: Tokenizer,
) -> None:
    async def scenario(bench: Bench) -> None:
        assert len(await collect(bench.engine.submit(request("0", prefix=ref("p"))))) == 8
        started = time.monotonic()
        cold = asyncio.create_task(
            collect(bench.engine.submit(request("cold", prefix=ref("hangs"))))
        )
        served = 0
        while not cold.done():
            outputs = await collect(bench.engine.submit(request(f"r{served}", prefix=ref("p"))))
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            served += 1
        seconds = time.monotonic() - started

        assert [(o.finish_reason, o.error) for o in cold.result()] == [
            (FinishReason.PREFIX_UNAVAILABLE, STORE_HANGS)
        ]
        assert served > 3
        assert seconds < 4, "two, on a machine that does nothing else"
        test_async_engine.STORE_ANSWERS.set()
        for attempt in range(500):
            again = bench.engine.submit(request(f"again-{attempt}", prefix=ref("hangs")))
            if (await collect(again))[-1].finish_reason is FinishReason.LENGTH:
                break
            await asyncio.sleep(0.01)
        else:
            raise AssertionError("the store answers again, and the task is not served")
        await bench.idle()

    test_async_engine.STORE_ANSWERS.clear()
    with_engine(tokenizer, scenario)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_thread_that_leaves_without_an_exception_has_died_too(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.gate.clear()
        stream = bench.engine.submit(request("r", max_tokens=60))
        await asyncio.sleep(0.01)
        assert not bench.engine.died
        monkeypatch.setattr(bench.engine._core, "step", lambda _: sys.exit(0))
        bench.runner.gate.set()

        assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT
        assert bench.engine.died

    with_engine(tokenizer, scenario)


def test_an_engine_that_was_stopped_has_not_died(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        before = bench.engine.heartbeat
        assert len(await collect(bench.engine.submit(request("r")))) == 8
        assert bench.engine.heartbeat > before
        await bench.engine.stop()
        assert not bench.engine.died

    with_engine(tokenizer, scenario)
