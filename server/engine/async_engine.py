"""The engine's face towards the event loop: submit, stream, abort; and the engine thread itself.

Two threads meet here. The event loop calls every public method and owns the streams; the engine thread
runs `_run`, which owns the `EngineCore` and everything below it. They exchange frozen messages only:
the inbox in one direction, `call_soon_threadsafe` in the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from server.engine.admission import EngineLimits, check_token_ids
from server.engine.calls import EngineCall, EngineCalls
from server.engine.core import EngineCore, EngineParts, StepResult
from server.engine.inbox import Inbox
from server.engine.messages import (
    AbortRequest,
    AddRequest,
    EvictPrefix,
    Message,
    SequenceOutput,
    UnpinTask,
    WarmPrefix,
)
from server.engine.observer import EngineObserver, EngineStatus
from server.engine.orders import Orders
from server.engine.output_processor import OutputProcessor
from server.engine.prefetch import LOOK_SECONDS, Prefetcher, PrefixAnswer, PrefixSource
from server.engine.request_stream import RequestStream
from server.engine.tokenizer import Tokenizer
from server.errors import DeadlineExceeded, EngineStopped
from server.host_threads import compute_alone
from server.types import (
    DeviceReport,
    FinishReason,
    GenerationRequest,
    PinState,
    PrefixRef,
    RequestOutput,
    StepStats,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

JOIN_SECONDS: Final = 10.0
"""What a step may still take when the engine is stopped."""


class AsyncEngine:
    """One engine thread, many streams."""

    def __init__(
        self,
        parts: EngineParts,
        tokenizer: Tokenizer,
        source: PrefixSource,
        limits: EngineLimits,
        observer: EngineObserver,
        *,
        seeds: random.Random,
        debug: bool = False,
    ) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        # These need no thread of their own.
        self.room, self.token_text = limits.room, tokenizer.token_text
        self.tokenizer_facts = tokenizer.facts
        self._observer = observer
        self._seeds = seeds
        self._block_bytes = parts.block_bytes
        self._inbox: Inbox[Message | PrefixAnswer | EngineCall] = Inbox()
        self._calls = EngineCalls(self._inbox.put)
        self._prefetcher = Prefetcher(
            source,
            self._inbox.put,
            parts.stage,
            bytes_per_token=parts.block_bytes / parts.blocks.block_size,
        )
        self._core = EngineCore(parts, self._prefetcher.request, time.monotonic, debug=debug)
        self._streams: dict[str, RequestStream] = {}
        self._orders = Orders(self._inbox.put)
        self._encoders = ThreadPoolExecutor(
            2, thread_name_prefix="encode", initializer=compute_alone
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._heartbeat = time.monotonic()
        self._stopping = False
        self._died = False
        self._last_stats: StepStats | None = None

    # ---- event loop: life ----------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the engine thread; outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._heartbeat = time.monotonic()
        self._thread.start()

    async def stop(self) -> None:
        """Stops the engine thread after its current step; streams that are open end with an error.

        A step that does not end is not waited for: the thread dies with the process.
        """
        self._stopping = True
        self._inbox.close()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)
        self._prefetcher.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self.end_streams("the server is shutting down")

    def end_streams(self, reason: str) -> None:
        """Ends every open stream and call with a word to its client, and takes no more requests."""
        self._stopping = True
        self._orders.fail(reason)
        self._calls.fail(reason)
        for request_id, stream in list(self._streams.items()):
            self._inbox.put(AbortRequest(request_id))
            self._fail(stream, reason, FinishReason.ABORT)

    def status(self) -> EngineStatus:
        """A snapshot for probes; cheap."""
        stats = self._last_stats
        return EngineStatus(
            alive=self._thread.is_alive() and not self._stopping,
            heartbeat_age_seconds=time.monotonic() - self._heartbeat,
            num_running=stats.num_running if stats else 0,
            num_waiting=stats.num_waiting + stats.num_waiting_for_prefix if stats else 0,
        )

    @property
    def heartbeat(self) -> float:
        """Monotonic seconds when the engine thread last came round its loop; it does so every second while idle."""
        return self._heartbeat

    @property
    def died(self) -> bool:
        """Whether the engine thread has ended although nobody stopped it."""
        started = self._thread.ident is not None
        return self._died or (started and not self._stopping and not self._thread.is_alive())

    # ---- event loop: requests ------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Most tokens that prefix, prompt and output may have together."""
        return self._limits.max_model_len

    async def tokenize(self, prompt: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt, computed off the event loop."""
        encode = functools.partial(self._tokenizer.encode, prompt, special_tokens=special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._encoders, encode)

    async def tokenize_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> tuple[int, ...]:
        """Token ids of a conversation, as `Tokenizer.encode_chat` gives and refuses them."""
        encode = functools.partial(
            self._tokenizer.encode_chat, messages, add_generation_prompt=add_generation_prompt
        )
        return await asyncio.get_running_loop().run_in_executor(self._encoders, encode)

    async def detokenize(self, token_ids: Sequence[int], param: str) -> str:
        """The text of tokens, special ones too, made off the event loop. Raises `InvalidParameter` for `param`."""
        check_token_ids(param, token_ids, self._limits.vocab_size)
        decode = functools.partial(self._tokenizer.decode, token_ids, special_tokens=True)
        return await asyncio.get_running_loop().run_in_executor(self._encoders, decode)

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Takes a request in. Raises `ContextTooLong`, `InvalidParameter`, `EngineOverloaded`, `DeadlineExceeded`,
        `EngineStopped`; once it returns, every choice ends with a finish reason.
        """
        self._limits.check(request)
        self._require_running()
        self._limits.check_queue(request, self._num_waiting(), self._num_waiting_tokens())
        assert request.request_id not in self._streams, "request ids are ours and unique"
        arrival, seed = time.monotonic(), request.sampling.seed
        if request.deadline is not None and request.deadline <= arrival:
            raise DeadlineExceeded("the request's time was over before it could begin")
        stream = RequestStream(OutputProcessor(request, self._tokenizer, arrival), self.abort)
        if request.deadline is not None:
            stream.expire_after(request.deadline - arrival, self._expire)
        self._streams[request.request_id] = stream
        seed = self._seeds.getrandbits(63) if seed is None else seed
        self._inbox.put(AddRequest(request, seed, arrival))
        return stream

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it stands; its blocks are free from the next plan on. Idempotent."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._inbox.put(AbortRequest(request_id))
            stream.end()
            self._account(stream.processor, "cancelled")

    def _expire(self, request_id: str) -> None:
        """The request's time is over: it ends wherever it stands, with what it has."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._inbox.put(AbortRequest(request_id))
            for output in stream.processor.cut(FinishReason.DEADLINE):
                stream.put(output)
            stream.end()
            self._account(stream.processor, "deadline")

    # ---- event loop: prefixes ------------------------------------------------------------------

    def warm(self, ref: PrefixRef) -> None:
        """Makes a prefix resident before the first request asks for it."""
        self._inbox.put(WarmPrefix(ref))

    def evict(self, digest: str) -> None:
        """Frees a prefix's blocks once no running request reads them; a pin is lifted. Any thread."""
        self._inbox.put(EvictPrefix(digest))

    async def pin(self, ref: PrefixRef, ttl_seconds: float | None = None) -> PinState:
        """Keeps a task's version resident, for ever without a TTL. Raises `PinRefused`, `EngineStopped`."""
        return await self._orders.pin(ref, ttl_seconds)

    async def follow_pin(self, ref: PrefixRef) -> str | None:
        """Moves a task's pin to its new live version; says why, if it was given up for the budget."""
        return await self._orders.follow_pin(ref)

    def unpin(self, task: str) -> None:
        """Ends the pin of a task, if it has one."""
        self._inbox.put(UnpinTask(task))

    async def device_report(self) -> DeviceReport:
        """What is resident now. Raises `EngineStopped`."""
        return dataclasses.replace(await self._orders.report(), block_bytes=self._block_bytes)

    async def run(self, function: Callable[[], T]) -> T:
        """Runs `function` on the engine thread between two steps: nothing else then uses the model.

        Returns or raises what it does; raises `EngineStopped`. Running requests wait meanwhile.
        """
        self._require_running()
        return await self._calls.run(function)

    def _require_running(self) -> None:
        if self._stopping or not self._thread.is_alive():
            raise EngineStopped("the engine takes no more requests")

    def _num_waiting(self) -> int:
        """Sequences taken in and not running, as of the last step; counted anew, so it can not drift."""
        taken = sum(s.processor.request.sampling.n for s in self._streams.values())
        return taken - (self._last_stats.num_running if self._last_stats else 0)

    def _num_waiting_tokens(self) -> int:
        """Prompt tokens of requests that have no answer yet; counted anew, likewise."""
        processors = (stream.processor for stream in self._streams.values())
        return sum(
            len(p.request.prompt_token_ids)
            for p in processors
            if p.timings.first_token_seconds is None
        )

    # ---- event loop: what comes back -----------------------------------------------------------

    def _deliver(self, result: StepResult) -> None:
        self._last_stats = result.stats
        self._observer.on_step(result.stats)
        now = time.monotonic()
        for output in result.outputs:
            self._deliver_one(output, now)
        for answer in result.answers:
            self._orders.answer(answer)

    def _deliver_one(self, output: SequenceOutput, now: float) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # aborted meanwhile
        try:
            increment = stream.processor.process(output, now)
        except Exception:  # a tokenizer may stumble over an id; the others of the step go on
            logger.exception("the text of request %s could not be made", output.request_id)
            self._inbox.put(AbortRequest(output.request_id))
            self._fail(stream, "the text of this request could not be made", FinishReason.ERROR)
            return
        if increment is None:
            return
        if increment.finish_reason is not None and output.finish_reason is None:
            self._inbox.put(AbortRequest(output.request_id, output.index))  # a stop string ended it
        stream.put(increment)
        if stream.processor.finished:
            stream.end()
            del self._streams[output.request_id]
            outcome = "error" if increment.error else str(increment.finish_reason)
            self._account(stream.processor, outcome, increment)

    def _account(
        self, processor: OutputProcessor, outcome: str, last: RequestOutput | None = None
    ) -> None:
        if processor.request.endpoint:  # else it is our own, and in no statistics
            self._observer.on_request(processor.stats(outcome, last.timings if last else None))

    def _fail(self, stream: RequestStream, error: str, reason: FinishReason) -> None:
        del self._streams[stream.processor.request.request_id]
        for output in stream.processor.fail(error, reason):
            stream.put(output)
        stream.end()
        self._account(stream.processor, "error")

    # ---- engine thread -------------------------------------------------------------------------

    def _run(self) -> None:
        """The engine thread: one step after another while there is work, else waits for a message."""
        assert self._loop is not None
        try:
            while not self._stopping:
                idle_seconds = LOOK_SECONDS if self._prefetcher.is_waiting else 1.0
                messages = self._inbox.drain(0.0 if self._core.has_work() else idle_seconds)
                self._heartbeat = time.monotonic()
                self._prefetcher.give_up_late(self._heartbeat)
                if messages or self._core.has_work():
                    self._post(self._deliver, self._core.step(messages))
        except BaseException:
            # Whatever it is: the clients must hear of it, and the process must not live on without an engine.
            logger.exception("the engine thread died")
            self._died = self._stopping = True
            self._post(self.end_streams, "the engine has failed")
            raise

    def _post(self, callback: Callable[[T], None], argument: T) -> None:
        """Runs `callback` on the event loop; nobody is left to hear when that has closed already."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, argument)
