"""A whole engine without threads, sockets or files: submit requests, step until they end.

For parity and bookkeeping tests that want the real scheduler, runner and model, one step at a time. Loads
answer after `load_delay` steps, as a worker thread would. Invariants are checked after every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from prefix_store.artifact import Prefix
from prefix_store.spec import PrefixManifest
from server.engine.core import EngineCore, EngineParts
from server.engine.messages import AbortRequest, AddRequest, EvictPrefix, SequenceOutput
from server.engine.prefetch import PrefixLoaded
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.kvcache.block_pool import BlockPool
from server.kvcache.kv_cache import KVCache
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.model.attention import make_attention_backend
from server.model.attention.base import PagedAttention
from server.model.compiled_layers import Backend, compile_layers
from server.model.loader import LoadedModel, adopt_model
from server.model.merged_linear import merge_linears
from server.model.prepacked_linear import prepack
from server.model.runner import ModelRunner
from server.types import GenerationRequest, PrefixRef, PrefixTier, SamplingParams

if TYPE_CHECKING:  # it needs triton
    from server.model.decode_graphs import DecodeGraphs, Recorder


def random_prefix(model: LoadedModel, length: int, seed: int) -> Prefix:
    """A prefix of random K/V with `length` virtual tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(length, heads, dim, generator=generator)

    layers = model.layout.layers
    return Prefix(
        digest=f"sha256:{seed:08d}-{length}",
        manifest=PrefixManifest(
            num_virtual_tokens=length, k_space="none", model_type=model.model_type
        ),
        keys=tuple(draw(x.num_kv_heads, x.key_dim) for x in layers),
        values=tuple(draw(x.num_kv_heads, x.value_dim) for x in layers),
    )


def prefix_ref(prefix: Prefix, task: str = "task", version: int = 1) -> PrefixRef:
    """What a request says of `prefix`."""
    manifest = prefix.manifest
    return PrefixRef(
        task, version, prefix.digest, manifest.num_virtual_tokens, manifest.first_position
    )


def generate_with_transformers(
    module: nn.Module, prompt: list[int], prefix: Prefix | None, num_tokens: int
) -> list[int]:
    """Greedy tokens from the model's own eager attention, the prefix as `past_key_values`."""
    device = next(module.parameters()).device
    cache = DynamicCache()
    start = 0
    if prefix is not None:
        start = prefix.manifest.first_position
        for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(
                k.transpose(0, 1)[None].to(device), v.transpose(0, 1)[None].to(device), layer
            )
    module.set_attn_implementation("eager")  # type: ignore[operator] # transformers' method
    tokens: list[int] = []
    feed = prompt
    with torch.inference_mode():
        for _ in range(num_tokens):
            positions = torch.arange(start, start + len(feed), device=device)[None]
            out = module(
                input_ids=torch.tensor([feed], device=device),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            start += len(feed)
            feed = [int(out.logits[0, -1].argmax())]
            tokens += feed
    return tokens


@dataclass
class Harness:
    """`finished[(request_id, index)]`, `tokens[...]` and `outputs[...]` fill up as `step` is called."""

    module: nn.Module
    num_blocks: int = 200
    block_size: int = 16
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    attention: str = "auto"
    load_delay: int = 2
    merged: bool = False
    prepacked: bool = False
    compiled: Backend | None = None
    prompt_cache: bool = True
    eos_token_ids: frozenset[int] = frozenset()
    recorder: Recorder | None = None  # of decode steps, with the triton backend
    overlapped: bool = False
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    finished: dict[tuple[str, int], SequenceOutput] = field(default_factory=dict)
    outputs: dict[tuple[str, int], list[SequenceOutput]] = field(default_factory=dict)
    prefixes: dict[str, Prefix] = field(default_factory=dict)
    num_preemptions: int = 0
    num_loads: int = 0
    num_evictions: int = 0
    num_hit_tokens: int = 0

    def __post_init__(self) -> None:
        self.model = adopt_model(self.module, model_id="tiny")
        if self.merged:
            self.model = merge_linears(self.model)
        if self.prepacked:
            self.model = prepack(self.model)
        if self.compiled is not None:
            self.model = compile_layers(self.model, backend=self.compiled)
        self.blocks = BlockPool(self.num_blocks, self.block_size)
        self.resident = ResidentPrefixes(self.blocks)
        cache = KVCache(self.model.layout, self.num_blocks, self.block_size, self.model.device)
        attention = PagedAttention(make_attention_backend(self.attention, self.model.device), cache)
        self.model.connect(attention)
        self.runner = ModelRunner(self.model, cache, attention)
        self.runner.recorded = self._recorded(cache, attention)
        self.kv_cache = cache
        limits = SchedulerLimits(self.max_num_seqs, self.max_num_batched_tokens, self.eos_token_ids)
        self.cached = PromptCache(self.blocks, enabled=self.prompt_cache)
        self.scheduler = Scheduler(limits, self.blocks, self.resident, self.cached)
        parts = EngineParts(
            scheduler=self.scheduler,
            blocks=self.blocks,
            prefixes=self.resident,
            prompt_cache=self.cached,
            runner=self.runner,
            block_bytes=1,
            overlapped=self.overlapped,
        )
        self.now = 0.0
        self.core = EngineCore(parts, self._request, lambda: self.now, debug=True)
        self.inbox: list[object] = []
        self._loads: deque[tuple[int, PrefixRef]] = deque()
        self.num_steps = 0

    def _recorded(self, cache: KVCache, attention: PagedAttention) -> DecodeGraphs | None:
        if self.recorder is None:
            return None
        from server.model.decode_graphs import DecodeGraphs

        num_rows, length = self.max_num_seqs, self.num_blocks * self.block_size
        graphs = DecodeGraphs(
            self.model,
            cache,
            attention,
            self.recorder,
            max_num_rows=num_rows,
            max_model_len=length,
        )
        graphs.record()
        return graphs

    def add(
        self,
        request_id: str,
        prompt: list[int],
        prefix: Prefix | None = None,
        sampling: SamplingParams | None = None,
        seed: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Submits a request; greedy, 8 tokens unless told otherwise."""
        if prefix is not None:
            self.prefixes[prefix.digest] = prefix
        request = GenerationRequest(
            request_id,
            tuple(prompt),
            sampling or SamplingParams(max_tokens=8, temperature=0.0),
            prefix_ref(prefix) if prefix else None,
            cache_salt=cache_salt,
        )
        self.inbox.append(AddRequest(request, seed, self.now))

    def abort(self, request_id: str) -> None:
        self.inbox.append(AbortRequest(request_id))

    def evict(self, prefix: Prefix) -> None:
        self.inbox.append(EvictPrefix(prefix.digest))

    def step(self) -> None:
        """One engine step, with the loads that are due."""
        while self._loads and self._loads[0][0] <= self.num_steps:
            _, ref = self._loads.popleft()
            prefix = self.prefixes[ref.digest]
            self.inbox.append(PrefixLoaded(ref, prefix, PrefixTier.DISK, 0.0))
        inbox, self.inbox = self.inbox, []
        result = self.core.step(inbox)  # type: ignore[arg-type]
        self.num_steps += 1
        self.now += 1.0
        self.num_preemptions += result.stats.num_preemptions
        self.num_hit_tokens += result.stats.num_hit_tokens
        self.num_evictions += sum(e.kind == "evict" for e in result.stats.events)
        for output in result.outputs:
            key = (output.request_id, output.index)
            self.outputs.setdefault(key, []).append(output)
            if output.token_id is not None:
                self.tokens.setdefault(key, []).append(output.token_id)
            if output.finish_reason is not None:
                self.finished[key] = output

    def run(self, max_steps: int = 2000) -> Mapping[tuple[str, int], list[int]]:
        """Steps until nothing is left to do; returns all tokens."""
        for _ in range(max_steps):
            self.step()
            idle = not (self.inbox or self._loads or self.core.has_work())
            if idle and not self.scheduler.num_waiting_for_prefix:
                return self.tokens
        raise AssertionError(f"not done after {max_steps} steps")

    def _request(self, ref: PrefixRef) -> None:
        self.num_loads += 1
        self._loads.append((self.num_steps + self.load_delay, ref))
