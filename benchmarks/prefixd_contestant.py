"""prefixd as a contestant: the engine that the server runs, without the sockets.

Model and prefixes take the way they take in production: a model directory through `bootstrap.build_engine`,
artifacts through `PrefixStore.put`. When `cold`, every call finds the device without a prefix and the host cache
switched off, so each task's prefix is read from disk, verified and loaded while the clock runs. Requests of a task
that has no prefix are served without.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ByteSize

from benchmarks.contest import Call
from benchmarks.workload import Request, TaskPrefix
from prefix_store.artifact import encode
from prefix_store.spec import BaseModelRef, PrefixManifest
from server.bootstrap import build_engine
from server.config import ServeConfig
from server.engine.request_stream import RequestStream
from server.host_threads import give_helpers_back
from server.types import (
    GenerationRequest,
    PrefixTier,
    RequestStats,
    SamplingParams,
    StepStats,
    prefix_ref,
)


class StepRecorder:
    """An `EngineObserver` that keeps the figures of every step."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_request(self, stats: RequestStats) -> None:
        """Requests are timed where their reader is, in `_follow`."""


class Prefixd:
    """All requests at once into `AsyncEngine`, each answer streamed token by token to its reader."""

    def __init__(
        self,
        model_dir: Path,
        store_dir: Path,
        prefixes: Iterable[TaskPrefix],
        *,
        kv_cache_bytes: int,
        cold: bool = True,
        name: str = "prefixd",
    ) -> None:
        self.name: Final = name
        config = ServeConfig(
            model=str(model_dir),
            device="cpu",
            store=store_dir,
            host_cache_bytes=ByteSize(0),
            kv_cache_bytes=ByteSize(kv_cache_bytes),
            prompt_cache=False,  # rounds repeat the same prompts, and each is to compute them
        )
        self._recorder = StepRecorder()
        self._serving = build_engine(config, self._recorder)
        self._num_calls = 0
        self.cold = cold
        self._tasks: set[str] = set()
        for prefix in prefixes:
            self.upload(prefix)
        self._loop = asyncio.Runner()
        self._loop.run(self._serving.start())

    @property
    def description(self) -> str:
        if not self._tasks:
            return "all requests at once, without prefixes"
        return f"all requests at once, prefixes {'from disk' if self.cold else 'resident'}"

    @property
    def steps(self) -> Sequence[StepStats]:
        """The engine's, of the last call."""
        return self._recorder.steps

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """One call: any number of tasks shares a step."""
        return [tuple(requests)]

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        """Evicts every prefix if cold, then submits all requests and reads all streams to their ends.

        Who computes has the cores to itself, in prefixd's turn and in those of others: here, unlike in a server, the main
        thread computes too, as it uploads prefixes and runs peers (`server.host_threads`).
        """
        give_helpers_back()
        call = self._loop.run(self._serve(requests, output_len))
        self._loop.run(self._serving.engine.run(give_helpers_back))
        return call

    def close(self) -> None:
        self._loop.run(self._serving.stop())
        self._loop.close()

    def upload(self, prefix: TaskPrefix) -> None:
        """Publishes it; the first request of its task loads it."""
        self._serving.store.put(prefix.task, self.artifact(prefix))
        self._tasks.add(prefix.task)

    def artifact(self, prefix: TaskPrefix) -> bytes:
        """What one uploads for this base."""
        base = self._serving.base
        manifest = PrefixManifest(
            num_virtual_tokens=prefix.keys[0].shape[0],
            k_space="post_rope",
            model_type=base.model_type,
            base_model=BaseModelRef(fingerprint=base.fingerprint),
        )
        return encode(manifest, prefix.keys, prefix.values)

    async def _serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        engine = self._serving.engine
        cold = sorted({r.task for r in requests} & self._tasks) if self.cold else []
        for task in cold:
            engine.evict(self._serving.store.resolve(task).digest)
        self._recorder.steps.clear()
        self._num_calls += 1
        started = time.perf_counter()
        streams = [engine.submit(self._request(r, output_len)) for r in requests]
        answers = await asyncio.gather(*(_follow(stream, started) for stream in streams))
        seconds = time.perf_counter() - started
        _check_cold(cold, requests, answers)
        return Call(
            requests=requests,
            tokens=tuple(answer.tokens for answer in answers),
            first_token_seconds=tuple(answer.first_token_seconds for answer in answers),
            seconds=seconds,
            decode_step_seconds=self._decode_steps(len(requests)),
        )

    def _request(self, request: Request, output_len: int) -> GenerationRequest:
        """Resolved here, inside the timing, as the HTTP handler does for each request."""
        task = request.task
        return GenerationRequest(
            request_id=f"{self._num_calls}-{request.index}",
            prompt_token_ids=request.prompt_token_ids,
            sampling=SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True),
            prefix=prefix_ref(self._serving.store.resolve(task)) if task in self._tasks else None,
        )

    def _decode_steps(self, num_rows: int) -> tuple[float, ...]:
        return tuple(
            step.duration_seconds
            for step in self._recorder.steps
            if step.num_decode_tokens == num_rows and step.num_prefill_tokens == 0
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    """`tier`: where the engine found the prefix when it first looked."""

    tokens: tuple[int, ...]
    first_token_seconds: float
    tier: PrefixTier


async def _follow(stream: RequestStream, started: float) -> _Answer:
    """Reads a stream to its end."""
    tokens: list[int] = []
    first, tier = 0.0, PrefixTier.NONE
    async for output in stream:
        if output.error is not None:
            raise RuntimeError(f"{output.request_id}: {output.error}")
        if not tokens:
            first, tier = time.perf_counter() - started, output.prefix_tier
        tokens.extend(output.token_ids)
    return _Answer(tuple(tokens), first, tier)


def _check_cold(
    cold: Sequence[str], requests: Sequence[Request], answers: Sequence[_Answer]
) -> None:
    """The first request of every cold task must have had its prefix read from disk."""
    first: dict[str, PrefixTier] = {}
    for request, answer in zip(requests, answers, strict=True):
        first.setdefault(request.task, answer.tier)
    warm = [task for task in cold if first[task] is not PrefixTier.DISK]
    assert not warm, f"these tasks began with their prefix in memory: {warm}"
