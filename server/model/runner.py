"""Performs a step plan: writes prefixes into the pool, runs the model once, samples.

Owned by the engine thread; `execute` is called by `EngineCore.step` only, `forward` by trials and the self-check too. Decides nothing: which rows run, in which
blocks, is all in the plan.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prefix_store.artifact import Prefix
from server.engine.messages import PrefixLoad, RowOutcome, ScheduledRow, SchedulerOutput
from server.kvcache.kv_cache import KVCache
from server.model.attention.base import PagedAttention
from server.model.forward_batch import build_forward_batch
from server.model.loader import LoadedModel
from server.model.recorded_steps import RecordedSteps
from server.model.sampler import sample


class ModelRunner:
    """One model, its KV pool, and the attention that connects them. `recorded`, if set, is asked for each step first."""

    def __init__(self, model: LoadedModel, kv_cache: KVCache, attention: PagedAttention) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._attention = attention
        self.recorded: RecordedSteps | None = None

    @torch.inference_mode()
    def execute(
        self, plan: SchedulerOutput, staged: Mapping[str, Prefix]
    ) -> tuple[RowOutcome, ...]:
        """One outcome per row of the plan. `staged` holds the prefixes that the plan loads, by digest."""
        for load in plan.prefix_loads:
            self._load_prefix(load, staged)
        if not plan.rows:
            return ()
        logits, best = self._logits(plan.rows)
        sampling = [row.sequence for row in plan.rows if row.sample]
        sampled = iter(sample(logits, sampling, self._model.eos_token_ids, best))
        outcomes = tuple(next(sampled) if row.sample else RowOutcome() for row in plan.rows)
        self._wipe_failed(plan.rows, outcomes)
        return outcomes

    def _logits(self, rows: tuple[ScheduledRow, ...]) -> tuple[Tensor, Tensor | None]:
        """Logits [number of sampling rows, V], and the most probable token of each if a graph has found it."""
        recorded = self.recorded.run(rows) if self.recorded else None
        return (self.forward(rows), None) if recorded is None else recorded

    @torch.inference_mode()
    def forward(self, rows: tuple[ScheduledRow, ...]) -> Tensor:
        """Logits [number of sampling rows, V] of one packed forward pass; writes the rows' K/V."""
        batch = build_forward_batch(rows, self._kv_cache, self._model.pack_shape)
        self._attention.begin(batch)
        try:
            logits = self._model.logits(batch.input_ids, batch.position_ids, batch.logits_indices)
            return logits[: batch.num_logits]
        finally:
            self._attention.end()

    def _load_prefix(self, load: PrefixLoad, staged: Mapping[str, Prefix]) -> None:
        prefix = staged[load.ref.digest]
        assert prefix.digest == load.ref.digest, "staged tensors of another version"
        self._kv_cache.write_prefix(load.block_ids, prefix)

    def _wipe_failed(
        self, rows: tuple[ScheduledRow, ...], outcomes: tuple[RowOutcome, ...]
    ) -> None:
        """Zeroes the own blocks of rows that went non-finite before another request gets them."""
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.error is not None:
                self._kv_cache.zero_blocks(row.block_ids[row.num_shared_blocks :])
