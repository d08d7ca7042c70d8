"""Decode steps as recorded graphs: one launch in place of the thousand that a forward pass is made of.

Owned by the engine thread. Recorded once at start, on CUDA with the triton backend (`server.bootstrap`); `ModelRunner` asks
for each step of rows that decode one token whether a graph fits it. A graph reads and writes fixed memory, so a step is: its
tokens, positions and work tables copied into that memory, the replay, and what it left picked up.

There is a graph for each number of rows of a few, and of those one for each length of contexts of a few: the grids of the kernels
are fixed, and a grid for the longest contexts would launch mostly empty programs for short ones. A step takes the least graph
that holds it, and is a forward pass where none does: many rows with very long contexts, whom launches cost little. The rows that only fill it have no keys, and write theirs into a slot that nobody reads.

B = rows of a graph, V = vocabulary.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from server.engine.messages import ScheduledRow
from server.kernels.work_tables import TableShape, WorkTables
from server.kvcache.kv_cache import KVCache
from server.kvcache.to_device import to_device
from server.model.attention.base import PagedAttention
from server.model.attention.triton import TablesKind, pack_plan
from server.model.attention.work_items import CHUNK, DecodeRow, WorkPlan
from server.model.fed_back_tokens import FedBackTokens
from server.model.forward_batch import ForwardBatch, RowSpan
from server.model.loader import LoadedModel
from server.model.recorded_steps import MOST_PARTS
from server.model.sampler import most_probable

logger = logging.getLogger(__name__)

_FEW_ROWS: Final = (1, 2, 4, 8)
_ROWS_STEP: Final = 16
_SHORT: Final = 1024  # keys of a row, and from there by
_LENGTH_FACTOR: Final = 4
_MOST_WORDS: Final = 2**19  # of a step's tables, which are copied to the device each time: 2 MB


class Recorder(Protocol):
    """Turns a function without arguments and results into one that does the same work again."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]: ...


class CudaRecorder:
    """By CUDA graphs that share their scratch memory: they never run side by side."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Runs `function` twice before, so that what is compiled or allocated once is not recorded."""
        before = torch.cuda.current_stream()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch has no annotations there
        aside.wait_stream(before)
        with torch.cuda.stream(aside):
            function()
            function()
        before.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        self._pool = graph.pool()
        replay: Callable[[], None] = graph.replay
        return replay


@dataclass(frozen=True, slots=True)
class GraphShape:
    """So many rows, of up to `kv_len` keys each."""

    num_rows: int
    kv_len: int

    def tables(self, block_size: int) -> TableShape:
        """A prefix and a row's own tokens are each cut, and each put into blocks, by themselves: hence 2 more."""
        num_parts = min(self.num_rows * (self.kv_len // CHUNK + 2), MOST_PARTS)
        return TableShape(self.num_rows, num_parts, num_parts, self.kv_len // block_size + 2)


def graph_shapes(max_num_rows: int, max_model_len: int, block_size: int) -> list[GraphShape]:
    """Every shape that is recorded, the least first: by rows, then by length."""
    few = takewhile(lambda count: count < max_num_rows, _FEW_ROWS)
    rows = [*few, *range(_ROWS_STEP, max_num_rows, _ROWS_STEP), max_num_rows]
    lengths = [min(_SHORT, max_model_len)]
    while lengths[-1] < max_model_len:
        lengths.append(min(lengths[-1] * _LENGTH_FACTOR, max_model_len))
    shapes = [GraphShape(count, length) for count in rows for length in lengths]
    return [s for s in shapes if s.tables(block_size).buffer_len <= _MOST_WORDS]


class _FixedTables:
    """The work tables of each kind of layer, in memory that all graphs have in common."""

    def __init__(self, shapes: Sequence[GraphShape], block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._room = max(shape.tables(block_size).buffer_len for shape in shapes)
        self._device = device
        self._buffers: dict[TablesKind, Tensor] = {}

    def view(self, kind: TablesKind, shape: GraphShape) -> WorkTables:
        """The tables of that kind as a graph of that shape reads them."""
        if kind not in self._buffers:
            self._buffers[kind] = torch.zeros(self._room, dtype=torch.int32, device=self._device)
        table_shape = shape.tables(self._block_size)
        return WorkTables.of(self._buffers[kind][: table_shape.buffer_len], table_shape)

    def plans(self, rows: Sequence[DecodeRow]) -> dict[TablesKind, WorkPlan]:
        """The work of these rows in each kind of layer."""
        return {kind: kind.plan(rows) for kind in self._buffers}

    def fill(self, plans: dict[TablesKind, WorkPlan], shape: GraphShape) -> None:
        """Copies the work of a step to where the graph of that shape reads it, once the step before has read its own."""
        for kind, plan in plans.items():
            words = pack_plan(plan, shape.tables(self._block_size))
            self._buffers[kind][: len(words)].copy_(to_device(words, self._device))


@dataclass(frozen=True)
class _FixedBatch(ForwardBatch):
    """A step in the graphs' own memory, as the model and the attention see it while it is recorded."""

    shape: GraphShape
    tables: _FixedTables

    def derive(self, key: Hashable, _: Callable[[], Any]) -> Any:
        """The tables that are filled before each replay, in place of those of the rows."""
        assert isinstance(key, TablesKind), f"only work tables have fixed memory, not {key}"
        return self.tables.view(key, self.shape)


class DecodeGraphs:
    """The graphs of one model, and the memory they read and write."""

    def __init__(
        self,
        model: LoadedModel,
        kv_cache: KVCache,
        attention: PagedAttention,
        recorder: Recorder,
        *,
        max_num_rows: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._attention = attention
        self._recorder = recorder
        device = kv_cache.device
        self._shapes = graph_shapes(max_num_rows, max_model_len, kv_cache.block_size)
        self._tables = _FixedTables(self._shapes, kv_cache.block_size, device)
        # Token, position and slot of each row.
        self._inputs = torch.zeros(3, max_num_rows, dtype=torch.int64, device=device)
        self._inputs[2] = kv_cache.scratch_slot
        self._indices = torch.arange(max_num_rows, device=device)
        self._best = torch.zeros(max_num_rows, dtype=torch.int64, device=device)
        self._logits = torch.empty(0)  # [B of the largest, V], once V is known
        self._replays: dict[GraphShape, Callable[[], None]] = {}

    @torch.inference_mode()
    def record(self, *, min_num_rows: int = 1) -> None:
        """Records the graphs of so many rows or more, the largest first: what it needed in between is room for the others."""
        self._shapes = [shape for shape in self._shapes if shape.num_rows >= min_num_rows]
        self._logits = self._forward(self._batch(self._shapes[-1])).clone()
        started = time.monotonic()
        for number, shape in enumerate(reversed(self._shapes), 1):
            work = functools.partial(self._recorded_work, self._batch(shape))
            self._replays[shape] = self._recorder.record(work)
            logger.info("decode graph %d of %d: %s", number, len(self._shapes), shape)
        logger.info(
            "%d decode graphs recorded in %.1f s", len(self._replays), time.monotonic() - started
        )

    @torch.inference_mode()
    def run(
        self, rows: Sequence[ScheduledRow], fed_back: FedBackTokens
    ) -> tuple[Tensor, Tensor] | None:
        """Logits [len(rows), V] of a step and `most_probable` of them, until the next step; None: no graph fits it."""
        if any(len(row.token_ids) != 1 or not row.sample for row in rows):
            return None
        longest = max(row.num_virtual_tokens + row.start + 1 for row in rows)
        shape = next(
            (s for s in self._shapes if s.num_rows >= len(rows) and s.kv_len >= longest), None
        )
        if shape is None:
            return None
        plans = self._tables.plans(_decode_rows(rows, shape.num_rows))
        if max((sum(plan.num_parts) for plan in plans.values()), default=0) > MOST_PARTS:
            return None
        self._tables.fill(plans, shape)
        inputs = to_device(self._inputs_of(rows, shape.num_rows), self._kv_cache.device)
        self._inputs[:, : shape.num_rows].copy_(inputs)
        fed_back.fill(rows, self._inputs[0])
        self._replays[shape]()
        return self._logits[: len(rows)], self._best[: len(rows)]

    def _inputs_of(self, rows: Sequence[ScheduledRow], num_rows: int) -> Tensor:
        """[3, B] on the host."""
        size, filling = self._kv_cache.block_size, num_rows - len(rows)
        slots = [row.block_ids[row.start // size] * size + row.start % size for row in rows]
        return torch.tensor(
            [
                [row.token_ids[0] for row in rows] + [0] * filling,
                [row.first_position + row.start for row in rows] + [0] * filling,
                slots + [self._kv_cache.scratch_slot] * filling,
            ]
        )

    def _batch(self, shape: GraphShape) -> _FixedBatch:
        """Rows of one token, about which the recorded work asks nothing but that."""
        B, block_size = shape.num_rows, self._kv_cache.block_size
        return _FixedBatch(
            input_ids=self._inputs[0, :B][None],
            position_ids=self._inputs[1, :B][None],
            slot_mapping=self._inputs[2, :B],
            logits_indices=self._indices[:B],
            num_logits=B,
            rows=tuple(RowSpan(r, 1, 1, 0, (), (0,), block_size) for r in range(B)),
            device=self._kv_cache.device,
            shape=shape,
            tables=self._tables,
        )

    def _recorded_work(self, batch: _FixedBatch) -> None:
        logits = self._forward(batch)
        self._logits[: batch.num_logits].copy_(logits)
        self._best[: batch.num_logits].copy_(most_probable(logits))

    def _forward(self, batch: _FixedBatch) -> Tensor:
        self._attention.begin(batch)
        try:
            return self._model.logits(batch.input_ids, batch.position_ids, batch.logits_indices)
        finally:
            self._attention.end()


def _decode_rows(rows: Sequence[ScheduledRow], num_rows: int) -> list[DecodeRow]:
    """The rows of a step as attention has them, and behind them such that have no keys."""
    decoding = [
        DecodeRow(
            token=index,
            kv_len=row.num_virtual_tokens + row.start + 1,
            prefix_len=row.num_virtual_tokens,
            prefix_block_ids=row.prefix_block_ids,
            own_block_ids=row.block_ids,
        )
        for index, row in enumerate(rows)
    ]
    return decoding + [DecodeRow(index, 0, 0, (), ()) for index in range(len(rows), num_rows)]
