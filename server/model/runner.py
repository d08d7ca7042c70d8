"""Performs a step plan: wipes, writes prefixes into the pool, runs the model once, samples.

Owned by the engine thread; `launch` is called by `EngineCore.step` only, `forward` by trials and the self-check too. Decides nothing:
which rows run, in which blocks, is all in the plan. Nothing here waits for a GPU: what it is given to do, it does in that order,
and what a plan frees may be written by the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from prefix_store.artifact import Prefix
from server.engine.messages import PrefixLoad, RowOutcome, ScheduledRow, SchedulerOutput
from server.kvcache.kv_cache import KVCache
from server.model.attention.base import PagedAttention
from server.model.device import current
from server.model.fed_back_tokens import FedBackTokens
from server.model.forward_batch import build_forward_batch
from server.model.loader import LoadedModel
from server.model.logprobs import StepLogprobs, step_logprobs
from server.model.recorded_steps import RecordedSteps
from server.model.sampler import NUMERICAL_ERROR, next_tokens, outcomes_of


class ModelRunner:
    """One model, its KV pool, and the attention that connects them. `recorded`, if set, is asked for each step first."""

    def __init__(self, model: LoadedModel, kv_cache: KVCache, attention: PagedAttention) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._attention = attention
        self._fed_back = FedBackTokens()
        self.recorded: RecordedSteps | None = None

    @torch.inference_mode()
    def launch(self, plan: SchedulerOutput, staged: Mapping[str, Prefix]) -> _Launched:
        """Has the device perform a plan. `staged` holds the prefixes that the plan loads, by digest."""
        with current(self._kv_cache.device):
            if plan.wipe_block_ids:
                self._kv_cache.zero_blocks(plan.wipe_block_ids)
            for load in plan.prefix_loads:
                self._load_prefix(load, staged)
            tokens, logprobs = self._sampled(plan.rows)
            return _Launched(plan.rows, tokens, logprobs)

    def _sampled(self, rows: tuple[ScheduledRow, ...]) -> tuple[Tensor, StepLogprobs | None]:
        """The next token of each sampling row, int64 [number of them], and what is to be told of their probabilities."""
        sampling = [row.sequence for row in rows if row.sample]
        tokens, logprobs = torch.empty(0, dtype=torch.int64), None
        if rows:
            logits, best = self._logits(rows)
            of_samples = logits[: len(sampling)]
            tokens = next_tokens(of_samples, sampling, self._model.eos_token_ids, best)
            logprobs = step_logprobs(rows, logits, tokens)
        self._fed_back.keep(sampling, tokens)
        return tokens, logprobs

    def _logits(self, rows: tuple[ScheduledRow, ...]) -> tuple[Tensor, Tensor | None]:
        """Logits as `forward` gives them, and the most probable token of each if a graph has found it."""
        recorded = self.recorded.run(rows, self._fed_back) if self.recorded else None
        return (self.forward(rows), None) if recorded is None else recorded

    @torch.inference_mode()
    def forward(self, rows: tuple[ScheduledRow, ...]) -> Tensor:
        """Logits [number of sampling rows, and behind them of tokens to tell of, V] of one packed forward pass; writes the
        rows' K/V.
        """
        batch = build_forward_batch(rows, self._kv_cache, self._model.pack_shape)
        self._fed_back.fill(rows, batch.input_ids[0])
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


class _Launched:
    """A step under way; its tokens are on their way to the host."""

    def __init__(
        self, rows: tuple[ScheduledRow, ...], tokens: Tensor, logprobs: StepLogprobs | None
    ) -> None:
        on_gpu = tokens.is_cuda
        self._rows = rows
        self._logprobs = logprobs
        self._tokens = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=on_gpu)
        self._tokens.copy_(tokens, non_blocking=True)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call] # torch has no annotations there
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(tokens.device))

    def outcomes(self) -> tuple[RowOutcome, ...]:
        """One per row of the plan, as soon as the device has them."""
        if self._copied is not None:
            self._copied.synchronize()
        sampled = iter(outcomes_of(self._tokens))
        outcomes = tuple(next(sampled) if row.sample else RowOutcome() for row in self._rows)
        if self._logprobs is None:
            return outcomes
        return tuple(
            replace(outcome, logprob=told.sampled, prompt_logprobs=told.prompt)
            if told.finite
            else RowOutcome(error=NUMERICAL_ERROR)
            for outcome, told in zip(outcomes, self._logprobs.of_rows(), strict=True)
        )
