"""An engine without threads but those that fetch prefixes: `EngineCore` driven by hand, for the benchmarks on a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from benchmarks.gpu_timing import synchronize
from prefix_store.artifact import Prefix, as_it_is
from server.engine.core import EngineCore, EngineParts
from server.engine.inbox import Inbox
from server.engine.messages import AddRequest, EvictPrefix, Message
from server.engine.prefetch import Prefetcher, PrefixAnswer
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.kvcache.block_pool import BlockPool
from server.kvcache.kv_cache import KVCache
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.model.attention import make_attention_backend
from server.model.attention.base import PagedAttention
from server.model.loader import LoadedModel
from server.model.prefix_transfer import Staging
from server.model.recorded_steps import record_decode_steps
from server.model.runner import ModelRunner
from server.types import GenerationRequest

BLOCK_SIZE: Final = 16
_TOKENS_PER_STEP: Final = 8192
_LOAD_SECONDS: Final = 10.0  # to wait for a prefix where there is nothing else to do


@dataclass(frozen=True, slots=True)
class HeldPrefix:
    """A prefix that was in host memory."""

    prefix: Prefix
    from_host: bool = True


@dataclass
class LocalEngine:
    """`EngineCore` driven by hand. `prefixes`, by digest, are what it finds in host memory."""

    model: LoadedModel
    num_blocks: int
    max_num_seqs: int = 256
    max_model_len: int = 4096
    prefixes: dict[str, Prefix] = field(default_factory=dict)
    first_token_seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        backend = make_attention_backend("auto", self.model.device)
        blocks = BlockPool(self.num_blocks, BLOCK_SIZE)
        resident = ResidentPrefixes(blocks)
        cache = KVCache(self.model.layout, self.num_blocks, BLOCK_SIZE, self.model.device)
        attention = PagedAttention(backend, cache)
        self.model.connect(attention)
        limits = SchedulerLimits(self.max_num_seqs, max(_TOKENS_PER_STEP, self.max_num_seqs))
        runner = ModelRunner(self.model, cache, attention)
        runner.recorded = record_decode_steps(
            self.model,
            cache,
            attention,
            backend,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
        )
        cached = PromptCache(blocks, enabled=False)  # each row is to compute its own prompt
        scheduler = Scheduler(limits, blocks, resident, cached)
        self._parts = EngineParts(scheduler, blocks, resident, cached, runner, 1)
        self._inbox: Inbox[Message | PrefixAnswer] = Inbox()
        on_gpu = self.model.device.type == "cuda"
        stage = Staging(self.model.device).stage if on_gpu else as_it_is
        self._prefetcher = Prefetcher(self, self._inbox.put, stage)
        self.overlap(on_gpu)

    def overlap(self, overlapped: bool) -> None:
        """Whether a step is launched while the one before runs; on a GPU it is, until told otherwise. Nothing may run."""
        parts = replace(self._parts, overlapped=overlapped)
        self._core = EngineCore(parts, self._prefetcher.request, time.perf_counter)

    def load(self, digest: str) -> HeldPrefix:
        """What the prefetch workers ask."""
        return HeldPrefix(self.prefixes[digest])

    def is_on_host(self, digest: str) -> bool:
        """All of them are."""
        return digest in self.prefixes

    def run(self, requests: Sequence[GenerationRequest]) -> float:
        """Serves them all, all at once; seconds until the last is done."""
        self.first_token_seconds.clear()
        self.step_seconds.clear()
        started = time.perf_counter()
        for i, request in enumerate(requests):
            self._inbox.put(AddRequest(request, seed=i, arrival=started))
        running = len(requests)
        while running:
            inbox = self._inbox.drain(0.0 if self._core.has_work() else _LOAD_SECONDS)
            before = time.perf_counter()
            result = self._core.step(inbox)
            now = time.perf_counter()
            self.step_seconds.append(now - before)
            for output in result.outputs:
                if output.error is not None:
                    raise RuntimeError(f"{output.request_id}: {output.error}")
                self.first_token_seconds.setdefault(output.request_id, now - started)
                running -= output.finish_reason is not None
        synchronize(self.model.device)
        return time.perf_counter() - started

    def evict(self, digest: str) -> None:
        """Frees a prefix's blocks with the next step."""
        self._inbox.put(EvictPrefix(digest))
