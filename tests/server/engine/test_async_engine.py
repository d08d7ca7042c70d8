"""The engine's face on a real event loop and a real engine thread; only model and store are doubles."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from prefix_store.artifact import Prefix
from prefix_store.errors import PrefixStoreError
from prefix_store.spec import PrefixManifest
from server.engine.admission import EngineLimits
from server.engine.async_engine import AsyncEngine
from server.engine.core import STEP_FAILED, EngineParts
from server.engine.messages import RowOutcome, SchedulerOutput
from server.engine.request_stream import RequestStream
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.tokenizer import Tokenizer
from server.errors import (
    ContextTooLong,
    EngineOverloaded,
    EngineStopped,
    InvalidParameter,
    PinRefused,
    RequestError,
)
from server.kvcache.block_pool import BlockPool
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.types import (
    FinishReason,
    GenerationRequest,
    PrefixRef,
    RequestOutput,
    RequestStats,
    SamplingParams,
    StepStats,
)

SCRIPT = "the quick brown fox jumps over the lazy dog. "
POISON_PROMPT = 299  # a row with this prompt fails; see `ScriptRunner`
STORE_ANSWERS = threading.Event()  # until then, loads of a digest with "hangs" in it do not end


@dataclass(frozen=True)
class Ended:
    """A step that has ended when it was launched."""

    rows: Sequence[RowOutcome]

    def outcomes(self) -> Sequence[RowOutcome]:
        return self.rows


class ScriptRunner:
    """Every sequence says SCRIPT, over and over. `gate` holds steps up; `break_next` makes one raise."""

    def __init__(self, script: Sequence[int]) -> None:
        self._script = script
        self.gate = threading.Event()
        self.gate.set()
        self.break_next = False
        self.step_seconds = 0.0

    def launch(self, plan: SchedulerOutput, staged: Mapping[str, Prefix]) -> Ended:
        assert self.gate.wait(20), "the test forgot to open the gate"
        time.sleep(self.step_seconds)
        for load in plan.prefix_loads:
            assert load.ref.digest in staged
        if self.break_next and plan.rows:
            self.break_next = False
            raise RuntimeError("the device is on fire")
        return Ended(
            [
                RowOutcome(error="a bad row")
                if POISON_PROMPT in row.sequence.request.prompt_token_ids
                else RowOutcome(
                    self._script[len(row.sequence.output_token_ids) % len(self._script)]
                    if row.sample
                    else None
                )
                for row in plan.rows
            ]
        )


@dataclass(frozen=True)
class Loaded:
    prefix: Prefix
    from_host: bool = False


class Source:
    """Prefixes by digest; the word "bad" in a digest is a failure, "crash" an error of ours, "hangs" no answer at all."""

    def load(self, digest: str) -> Loaded:
        if "bad" in digest:
            raise PrefixStoreError("the blob is damaged")
        if "crash" in digest:
            raise ZeroDivisionError
        manifest = PrefixManifest(num_virtual_tokens=4, k_space="none", model_type="fake")
        if "hangs" in digest:
            assert STORE_ANSWERS.wait(20), "the test forgot to let the store answer"
        return Loaded(Prefix(digest, manifest, (), ()))

    def is_on_host(self, digest: str) -> bool:
        return False


@dataclass
class Observer:
    steps: list[StepStats] = field(default_factory=list)
    requests: list[RequestStats] = field(default_factory=list)

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)


@dataclass
class Bench:
    engine: AsyncEngine
    runner: ScriptRunner
    blocks: BlockPool
    prefixes: ResidentPrefixes
    observer: Observer

    async def idle(self) -> None:
        """Waits until every block is back but those of resident prefixes."""
        for _ in range(2000):
            if self.blocks.num_used == self.prefixes.num_blocks and not self.engine._streams:
                return
            await asyncio.sleep(0.002)
        raise AssertionError("blocks are held although nothing is open")


def with_engine(tokenizer: Tokenizer, scenario: Callable[[Bench], Awaitable[None]]) -> None:
    """Runs a scenario against a started engine and stops it afterwards; at most 20 seconds."""

    async def main() -> None:
        blocks = BlockPool(41, 4)
        prefixes = ResidentPrefixes(blocks)
        runner, observer = ScriptRunner(tokenizer.encode(SCRIPT)), Observer()
        prompt_cache = PromptCache(blocks, enabled=False)
        scheduler = Scheduler(SchedulerLimits(4, 16), blocks, prefixes, prompt_cache)
        engine = AsyncEngine(
            EngineParts(scheduler, blocks, prefixes, prompt_cache, runner, 1),
            tokenizer,
            Source(),
            EngineLimits(
                max_model_len=100,
                position_limit=120,
                pool_blocks=20,
                block_size=4,
                vocab_size=300,
                max_num_queued=6,
            ),
            observer,
            seeds=random.Random(0),
            debug=True,
        )
        await engine.start()
        try:
            await scenario(Bench(engine, runner, blocks, prefixes, observer))
        finally:
            runner.gate.set()
            await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 20))


def request(
    request_id: str,
    *,
    prompt: tuple[int, ...] = (1, 2, 3),
    prefix: PrefixRef | None = None,
    **sampling: object,
) -> GenerationRequest:
    params = SamplingParams(**({"max_tokens": 8, "temperature": 0.0} | sampling))  # type: ignore[arg-type]
    return GenerationRequest(request_id, prompt, params, prefix)


def ref(name: str, num_virtual_tokens: int = 4, first_position: int = 4) -> PrefixRef:
    return PrefixRef(name, 1, f"sha256:{name}", num_virtual_tokens, first_position)


async def collect(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


def text_of(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(o.text for o in outputs if o.index == index)


def test_a_request_is_streamed_to_its_end(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        outputs = await collect(bench.engine.submit(request("r")))
        script = tokenizer.encode(SCRIPT)

        assert [t for o in outputs for t in o.token_ids] == list(script[:8])
        assert text_of(outputs) == tokenizer.decode(script[:8])
        assert [o.finish_reason for o in outputs] == [None] * 7 + [FinishReason.LENGTH]
        assert [o.num_output_tokens for o in outputs] == list(range(1, 9))
        assert [s.outcome for s in bench.observer.requests] == ["length"]
        await bench.idle()

    with_engine(tokenizer, scenario)


def test_choices_are_interleaved_and_each_ends_once(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        outputs = await collect(bench.engine.submit(request("r", n=3)))

        assert len({text_of(outputs, index) for index in range(3)}) == 1
        assert sorted(o.index for o in outputs if o.finish_reason) == [0, 1, 2]
        assert [s.num_output_tokens for s in bench.observer.requests] == [24]
        await bench.idle()

    with_engine(tokenizer, scenario)


def test_closing_a_stream_aborts_the_request_and_frees_its_blocks(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.engine.submit(request("r", max_tokens=60))
        await anext(stream)
        await stream.aclose()
        await stream.aclose()

        assert await collect(stream) == []
        assert [s.outcome for s in bench.observer.requests] == ["cancelled"]
        await bench.idle()

    with_engine(tokenizer, scenario)


@pytest.mark.parametrize("by", ["aclose", "abort"])
def test_ending_a_request_lets_go_a_reader_that_waits(tokenizer: Tokenizer, by: str) -> None:
    """The one who closes need not be the one who reads."""

    async def scenario(bench: Bench) -> None:
        bench.runner.gate.clear()
        stream = bench.engine.submit(request("r"))
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0.01)
        if by == "aclose":
            await stream.aclose()
        else:
            bench.engine.abort("r")
        assert await asyncio.wait_for(reader, 5) == []
        bench.runner.gate.set()
        await bench.idle()

    with_engine(tokenizer, scenario)


def test_a_stop_string_ends_the_request_in_the_engine_too(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.step_seconds = 0.002  # a model is slower than the loop is to hear of a stop
        outputs = await collect(bench.engine.submit(request("r", max_tokens=70, stop=("fox",))))

        assert text_of(outputs) == "the quick brown "
        assert outputs[-1].stop_reason == "fox"
        await bench.idle()
        tokens = sum(s.num_decode_tokens for s in bench.observer.steps)
        assert tokens < 65, "the engine went on to max_tokens"

    with_engine(tokenizer, scenario)


def test_one_too_many_is_refused_and_the_others_go_on(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.gate.clear()
        streams = [bench.engine.submit(request(str(i), n=2)) for i in range(3)]
        with pytest.raises(EngineOverloaded, match="6 sequences are waiting; at most 6"):
            bench.engine.submit(request("x"))
        await streams[0].aclose()
        streams[0] = bench.engine.submit(request("y", n=2))
        bench.runner.gate.set()

        assert [len(await collect(stream)) for stream in streams] == [16, 16, 16]
        await bench.idle()

    with_engine(tokenizer, scenario)


REFUSED: dict[str, tuple[GenerationRequest, type[RequestError], str]] = {
    "model length": (request("r", max_tokens=98), ContextTooLong, "prompt"),
    "with prefix": (request("r", max_tokens=94, prefix=ref("p")), ContextTooLong, "prompt"),
    "positions": (
        request("r", max_tokens=50, prefix=ref("p", first_position=68)),
        ContextTooLong,
        "prompt",
    ),
    "pool": (request("r", max_tokens=74, prefix=ref("p", 5)), ContextTooLong, "prompt"),
    "no prompt": (request("r", prompt=()), InvalidParameter, "prompt"),
    "id too large": (request("r", prompt=(1, 300)), InvalidParameter, "prompt"),
    "negative id": (request("r", prompt=(-1,)), InvalidParameter, "prompt"),
    "stop id": (request("r", stop_token_ids=(300,)), InvalidParameter, "stop_token_ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_served_is_refused_at_once_and_names_the_field(
    tokenizer: Tokenizer, name: str
) -> None:
    refused, error, param = REFUSED[name]

    async def scenario(bench: Bench) -> None:
        with pytest.raises(error) as caught:
            bench.engine.submit(refused)
        assert caught.value.param == param
        assert len(await collect(bench.engine.submit(request("r")))) == 8, "the id is still free"

    with_engine(tokenizer, scenario)


def test_what_just_fits_is_served_to_its_last_token(tokenizer: Tokenizer) -> None:
    """76 own tokens take 19 of the 20 blocks that the engine promises, the prefix takes the other."""

    async def scenario(bench: Bench) -> None:
        outputs = await collect(bench.engine.submit(request("r", max_tokens=73, prefix=ref("p"))))
        assert outputs[-1].num_output_tokens == 73

    with_engine(tokenizer, scenario)


def test_a_prefix_that_can_not_be_loaded_ends_only_its_requests(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        names = ["bad", "good", "crash"]
        streams = [bench.engine.submit(request(n, prefix=ref(n))) for n in names]
        outputs = {n: await collect(s) for n, s in zip(names, streams, strict=True)}

        assert outputs["good"][-1].finish_reason is FinishReason.LENGTH
        assert [o.error for o in outputs["bad"]] == ["the blob is damaged"]
        assert [o.error for o in outputs["crash"]] == ["the prefix could not be loaded"]
        await bench.idle()
        assert "sha256:good" in bench.prefixes

    with_engine(tokenizer, scenario)


def test_a_bad_row_fails_alone(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        good = bench.engine.submit(request("good"))
        bad = bench.engine.submit(request("bad", prompt=(POISON_PROMPT,)))

        assert [o.error for o in await collect(bad)] == ["a bad row"]
        assert len(await collect(good)) == 8
        await bench.idle()

    with_engine(tokenizer, scenario)


def test_a_step_that_raises_fails_its_rows_and_the_engine_goes_on(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.break_next = True
        stream = bench.engine.submit(request("r"))

        assert [(o.finish_reason, o.error) for o in await collect(stream)] == [
            (FinishReason.ERROR, STEP_FAILED)
        ]
        assert len(await collect(bench.engine.submit(request("next")))) == 8
        assert bench.engine.status().alive
        await bench.idle()

    with_engine(tokenizer, scenario)


class _StumblingTokenizer(Tokenizer):
    """Can not decode one id, as tokenizers that know fewer ids than the model has logits."""

    stumbles_over = -1

    def decode(self, token_ids: Sequence[int], *, special_tokens: bool = False) -> str:
        if self.stumbles_over in token_ids:
            raise KeyError(self.stumbles_over)
        return super().decode(token_ids, special_tokens=special_tokens)


def test_text_that_can_not_be_made_fails_one_request_and_not_its_batch(
    tokenizer: Tokenizer,
) -> None:
    stumbling = _StumblingTokenizer(tokenizer._tokenizer)
    stumbling.stumbles_over = tokenizer.encode(SCRIPT)[4]

    async def scenario(bench: Bench) -> None:
        bench.runner.gate.clear()
        long = bench.engine.submit(request("long"))
        short = bench.engine.submit(request("short", max_tokens=4))
        bench.runner.gate.set()
        outputs = await collect(long)

        assert [o.finish_reason for o in outputs][-1] is FinishReason.ERROR
        assert len(await collect(short)) == 4
        await bench.idle()

    with_engine(stumbling, scenario)


def test_stopping_ends_open_streams_with_an_error_and_takes_no_more(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.gate.clear()
        stream = bench.engine.submit(request("r", max_tokens=60, n=2))
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.02, bench.runner.gate.set)
        await bench.engine.stop()
        outputs = await reader

        assert [(o.index, o.error) for o in outputs if o.finish_reason] == [
            (0, "the server is shutting down"),
            (1, "the server is shutting down"),
        ]
        assert not bench.engine.status().alive
        with pytest.raises(EngineStopped):
            bench.engine.submit(request("late"))

    with_engine(tokenizer, scenario)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_if_the_engine_thread_dies_every_stream_ends_and_status_says_so(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe that says "alive" while every client waits is the worst way to fail."""

    async def scenario(bench: Bench) -> None:
        bench.runner.gate.clear()
        streams = [bench.engine.submit(request(str(i), max_tokens=60)) for i in range(2)]
        await asyncio.sleep(0.01)
        monkeypatch.setattr(bench.engine._core, "step", _die)
        bench.runner.gate.set()
        outputs = [await collect(stream) for stream in streams]

        assert [o[-1].error for o in outputs] == ["the engine has failed"] * 2
        assert not bench.engine.status().alive
        with pytest.raises(EngineStopped):
            bench.engine.submit(request("late"))

    with_engine(tokenizer, scenario)


def _die(inbox: object) -> None:
    raise AssertionError("an invariant is broken")


def test_a_warmed_prefix_is_resident_before_its_first_request(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine.warm(ref("p"))
        for _ in range(2000):
            if "sha256:p" in bench.prefixes:
                break
            await asyncio.sleep(0.002)
        outputs = await collect(bench.engine.submit(request("r", prefix=ref("p"))))
        assert outputs[-1].prefix_tier == "device"
        bench.engine.evict("sha256:p")
        for _ in range(2000):
            if "sha256:p" not in bench.prefixes:
                break
            await asyncio.sleep(0.002)
        await bench.idle()
        assert bench.blocks.num_used == 0

    with_engine(tokenizer, scenario)


def test_many_clients_that_come_and_go_leave_nothing_behind(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        rng = random.Random(3)

        async def client(number: int) -> None:
            for turn in range(15):
                name = f"{number}.{turn}"
                prefix = rng.choice([None, ref("a"), ref("b"), ref("bad")])
                stream = bench.engine.submit(
                    request(name, max_tokens=rng.randint(1, 30), n=rng.randint(1, 2), prefix=prefix)
                )
                leaves_after = rng.choice([0, 1, 5, 999])
                async for _ in stream:
                    leaves_after -= 1
                    if leaves_after < 0:
                        break
                await stream.aclose()

        await asyncio.gather(*(client(i) for i in range(3)))
        await bench.idle()
        assert len(bench.observer.requests) == 45, "each request is accounted for once"

    with_engine(tokenizer, scenario)


def test_prompts_are_encoded_off_the_event_loop(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.engine.tokenize("the fox") == tokenizer.encode("the fox")

    with_engine(tokenizer, scenario)


def test_a_pin_is_answered_reported_and_refused_by_the_engine(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        engine = bench.engine
        state = await engine.pin(ref("p"), 3600)
        assert (state.refusal, state.num_pinned_blocks) == (None, 1)
        with pytest.raises(PinRefused, match="pin_budget"):
            await engine.pin(dataclasses.replace(ref("q"), num_virtual_tokens=10_000))
        for _ in range(2000):
            report = await engine.device_report()
            if report.residents:
                break
            await asyncio.sleep(0.002)
        [resident] = report.residents
        assert (resident.ref.digest, resident.pinned) == ("sha256:p", True)
        assert resident.pin_seconds_left is not None
        assert 3590 < resident.pin_seconds_left <= 3600
        assert await engine.follow_pin(dataclasses.replace(ref("other"), task="nobody")) is None
        engine.unpin(ref("p").task)
        engine.evict("sha256:p")
        assert not (await engine.device_report()).residents
        await bench.idle()

    with_engine(tokenizer, scenario)


def test_who_asks_a_stopped_engine_is_told_so(tokenizer: Tokenizer) -> None:
    async def scenario(bench: Bench) -> None:
        bench.runner.gate.clear()
        stream = bench.engine.submit(request("r"))
        await asyncio.sleep(0.02)
        asked = asyncio.ensure_future(bench.engine.device_report())
        await asyncio.sleep(0)
        stopping = asyncio.ensure_future(bench.engine.stop())
        await asyncio.sleep(0.02)
        bench.runner.gate.set()
        await stopping
        with pytest.raises(EngineStopped):
            await asked
        with pytest.raises(EngineStopped):
            await bench.engine.pin(ref("p"))
        await stream.aclose()

    with_engine(tokenizer, scenario)
