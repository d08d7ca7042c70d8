"""Attention on CUDA: our own kernels for rows that decode, torch's ragged flash attention for the others.

Runs on the engine thread during a forward pass. Decode rows go through `server.kernels`: their keys are cut
into work items (`work_items.py`), a prefix is read once for the rows of its task, partial results are merged.
What the kernels do not take (heads wider than 256) goes to the sdpa backend, layer by layer.

With Triton's interpreter the kernels run on the CPU, slowly; that is for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import triton
from torch import Tensor

from prefix_store.spec import KVLayout
from server.kernels.decode_partials import MAX_HEAD_DIM, decode_partials, rows_per_item
from server.kernels.merge_partials import merge_partials
from server.kernels.work_tables import TableShape, WorkTables, pack
from server.kvcache.kv_cache import LayerKV
from server.kvcache.to_device import to_device
from server.model.attention.base import AttentionParams
from server.model.attention.sdpa import SdpaAttention, attend_prefill_rows
from server.model.attention.varlen import attend_ragged, can_attend
from server.model.attention.work_items import DecodeRow, WorkPlan, plan_work
from server.model.forward_batch import ForwardBatch

_MIN_ROOM: Final = (
    16  # tables are padded to powers of two from here, so that few shapes are compiled
)


def is_interpreted() -> bool:
    """Whether kernels run on the CPU (TRITON_INTERPRET=1 when triton was first imported)."""
    return bool(triton.knobs.runtime.interpret)


class TritonAttention:
    """Decode by work items; `grouped` False reads a shared prefix once per row, to the same bits, for comparison."""

    def __init__(self, *, grouped: bool = True) -> None:
        self._grouped = grouped
        self._sdpa = SdpaAttention()

    def can_be_recorded(self, layout: KVLayout) -> bool:
        """Unless a layer's heads are so wide that the sdpa backend takes it."""
        return all(max(x.key_dim, x.value_dim) <= MAX_HEAD_DIM for x in layout.layers)

    def attend(
        self, queries: Tensor, layer: LayerKV, params: AttentionParams, batch: ForwardBatch
    ) -> Tensor:
        """[T, Hq, Dk] -> [T, Hq, Dv]."""
        if max(layer.keys.shape[-1], layer.values.shape[-1]) > MAX_HEAD_DIM:
            return self._sdpa.attend(queries, layer, params, batch)
        out = queries.new_empty(*queries.shape[:2], layer.values.shape[-1])
        if any(row.num_tokens == 1 for row in batch.rows):
            self._decode(queries, layer, params, batch, out)
        if batch.prefill_rows:
            prefill = attend_ragged if can_attend(queries, layer, params) else attend_prefill_rows
            prefill(queries, layer, params, batch, out)
        return out

    def _decode(
        self,
        queries: Tensor,
        layer: LayerKV,
        params: AttentionParams,
        batch: ForwardBatch,
        out: Tensor,
    ) -> None:
        together = rows_per_item(queries.shape[1] // layer.keys.shape[1])
        kind = TablesKind(together, params.window, self._grouped)
        tables = batch.derive(kind, functools.partial(make_tables, batch, kind))
        partial_out, partial_lse = decode_partials(
            queries,
            layer.keys,
            layer.values,
            tables,
            block_size=batch.rows[0].block_size,
            scale=params.scale,
            window=params.window,
            softcap=params.softcap,
        )
        merge_partials(partial_out, partial_lse, tables, out, sinks=params.sinks)


@dataclass(frozen=True, slots=True)
class TablesKind:
    """What the work of a decode step depends on beside its rows; layers of one kind read the same tables."""

    rows_per_item: int
    window: int | None
    grouped: bool

    def plan(self, rows: Sequence[DecodeRow]) -> WorkPlan:
        """The work items of these rows in such a layer."""
        return plan_work(
            rows, rows_per_item=self.rows_per_item, window=self.window, grouped=self.grouped
        )


def make_tables(batch: ForwardBatch, kind: TablesKind) -> WorkTables:
    """The tables of a step's decode rows, on its device, in a shape with room to the next power of two."""
    rows = [
        DecodeRow(row.first, row.kv_len, row.prefix_len, row.prefix_block_ids, row.own_block_ids)
        for row in batch.rows
        if row.num_tokens == 1
    ]
    plan = kind.plan(rows)
    shape = shape_for(plan)
    return WorkTables.of(to_device(pack_plan(plan, shape), batch.device), shape)


def shape_for(plan: WorkPlan) -> TableShape:
    """The least shape of powers of two that holds a plan."""
    tables = max(len(row.prefix_block_ids) + len(row.own_block_ids) for row in plan.rows)
    return TableShape(
        num_rows=_room(len(plan.rows)),
        num_items=_room(len(plan.items)),
        num_parts=_room(sum(plan.num_parts)),
        table_width=_room(tables),
    )


def _room(count: int) -> int:
    return max(_MIN_ROOM, 1 << (count - 1).bit_length())


def pack_plan(plan: WorkPlan, shape: TableShape) -> Tensor:
    """A plan as the words of tables of that shape [shape.buffer_len], int32, on the host."""
    return pack(
        shape,
        plan.items,
        [row.token for row in plan.rows],
        [row.kv_len for row in plan.rows],
        [row.prefix_len for row in plan.rows],
        plan.part_offsets,
        [row.prefix_block_ids + row.own_block_ids for row in plan.rows],
    )
