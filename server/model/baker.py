"""Baking: what a prompt leaves in the KV cache, taken out as a prefix. Token ids or soft prompts alike.

A prompt that every request would begin with is, after one prefill, nothing but keys and values at positions
0..P-1; a prefix of exactly those gives the same logits. Everything here runs on the engine thread, between
two steps (`AsyncEngine.run`), because the prefill borrows the resident model: it goes through our own
attention, over a KV cache of its own, in chunks, so that running requests wait for one chunk at a time.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from prefix_store.importers.native import LayerTensors
from prefix_store.importers.soft_prompt import SoftPrompt
from server.engine.messages import ScheduledRow
from server.engine.sequence import Sequence
from server.kvcache.kv_cache import KVCache
from server.model.attention.base import AttentionBackend, PagedAttention
from server.model.device import memory_or_later
from server.model.forward_batch import build_forward_batch
from server.model.loader import LoadedModel
from server.types import GenerationRequest, SamplingParams

_BLOCK_SIZE: Final = 16
CHUNK_TOKENS: Final = 512


class Baker:
    """Starts bakes on one model."""

    def __init__(self, model: LoadedModel, backend: AttentionBackend) -> None:
        self._model = model
        self._backend = backend

    def start(self, prompt: SoftPrompt | tuple[int, ...]) -> Bake:
        """A bake of token ids or of embeddings. Takes memory for the whole prefix, or raises `EngineOverloaded`."""
        tensor = prompt.embeddings if isinstance(prompt, SoftPrompt) else torch.tensor(prompt)
        with memory_or_later("to bake the prompt"):
            return Bake(self._model, self._backend, tensor)


class Bake:
    """One prompt on its way, ids [P] or embeddings [P, hidden]. `step` until that says True, then `result`."""

    def __init__(self, model: LoadedModel, backend: AttentionBackend, prompt: Tensor) -> None:
        self._model = model
        self._prompt = prompt.to(model.device)
        self._num_blocks = -(-len(prompt) // _BLOCK_SIZE)
        # Block 0 stays zero, as in every pool.
        self._cache = KVCache(model.layout, self._num_blocks + 1, _BLOCK_SIZE, model.device)
        self._attention = PagedAttention(backend, self._cache)
        self._done = 0

    @torch.inference_mode()
    def step(self) -> bool:
        """Prefills the next chunk; True when it was the last. Raises `EngineOverloaded` for want of memory."""
        count = min(CHUNK_TOKENS, len(self._prompt) - self._done)
        batch = build_forward_batch([self._row(count)], self._cache)
        with memory_or_later("to bake the prompt"), self._model.connected(self._attention):
            self._attention.begin(batch)
            try:
                self._model.module(
                    **self._inputs(count),
                    position_ids=batch.position_ids,
                    use_cache=False,
                    logits_to_keep=batch.logits_indices,
                )
            finally:
                self._attention.end()
        self._done += count
        return self._done == len(self._prompt)

    def result(self) -> LayerTensors:
        """In the serving dtype and in host memory."""
        assert self._done == len(self._prompt), "the bake is not done"
        own = slice(_BLOCK_SIZE, _BLOCK_SIZE + len(self._prompt))
        layers = self._cache.layers
        return [x.keys[own].cpu() for x in layers], [x.values[own].cpu() for x in layers]

    def _inputs(self, count: int) -> dict[str, Tensor]:
        chunk = self._prompt[self._done : self._done + count][None]
        if chunk.is_floating_point():
            return {"inputs_embeds": chunk.to(getattr(torch, self._model.layout.dtype))}
        return {"input_ids": chunk}

    def _row(self, count: int) -> ScheduledRow:
        """A row of the right length; its token ids are not read."""
        request = GenerationRequest("bake", (0,), SamplingParams())
        return ScheduledRow(
            sequence=Sequence(request, index=0, seed=0, arrival=0.0),
            token_ids=(0,) * count,
            start=self._done,
            prefix_block_ids=(),
            num_virtual_tokens=0,
            first_position=0,
            block_ids=tuple(range(1, self._num_blocks + 1)),
            sample=False,
        )
