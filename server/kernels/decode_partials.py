"""Decode attention over a paged KV pool, a chunk of keys at a time: the first of two kernels.

Launched by the engine thread from `server.model.attention.triton`, once per layer. A program takes one work
item and one kv head. The rows of an item and the query heads that share the kv head are the rows of one
matrix, so that a chunk of a shared prefix is read once for all of them. It leaves, per row and query head, the
chunk's own softmax result and its log-sum-exp; `merge_partials` makes one of them.

A result depends on nothing but the row's query and the chunk's keys: tiles begin at the chunk's start and each
matrix row has its own maximum and sum. So a row's bits are the same whoever shares its item.

R rows, Hq query heads, H kv heads, G = Hq / H, Dk and Dv head dims, S slots, N partial results.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202
# (triton compiles annotations too, and takes none but its own; where it is absent `jit` is of no known type)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.work_tables import NUM_ITEM_FIELDS, WorkTables

MAX_HEAD_DIM: Final = 256
LOG2_E: Final = math.log2(math.e)  # exponentials are taken to base 2, which the hardware has


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a program works: `block_m` matrix rows, `block_n` keys at a time, which divide the chunk."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, values: Tensor) -> Tiles:
        """By the shapes alone. Wide heads and float32 take fewer keys, or shared memory would not hold them."""
        wide = max(keys.shape[-1], values.shape[-1]) > 128 or keys.element_size() > 2
        return cls(block_m=block_m(queries.shape[1] // keys.shape[1]), block_n=32 if wide else 64)


def block_m(group: int) -> int:
    """Matrix rows for `group` query heads to a kv head: 32, or more if they alone need more."""
    return max(32, int(triton.next_power_of_2(group)))


def rows_per_item(group: int) -> int:
    """How many rows an item may have."""
    return block_m(group) // group


def _padded(head_dim: int) -> int:
    """A dot product takes powers of two from 16."""
    return max(16, int(triton.next_power_of_2(head_dim)))


@triton.jit
def _decode_partials_kernel(
    queries,  # [T, Hq, Dk]
    keys,  # [S, H, Dk]
    values,  # [S, H, Dv]
    partial_out,  # [N, Hq, Dv] float32
    partial_lse,  # [N, Hq] float32, base 2
    items,
    tokens,
    kv_lens,
    prefix_lens,
    part_offsets,
    block_table,
    q_stride_token,
    q_stride_head,
    k_stride_slot,
    k_stride_head,
    v_stride_slot,
    v_stride_head,
    table_width,
    scale,
    num_query_heads,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # 0: none
    ITEM_FIELDS: tl.constexpr,
    LOG2E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head = tl.program_id(0)
    item = items + tl.program_id(1) * ITEM_FIELDS
    num_rows = tl.load(item + 1)
    if num_rows == 0:
        return
    first_row = tl.load(item)
    start = tl.load(item + 3)
    kv_len = tl.load(kv_lens + first_row)
    prefix_len = tl.load(prefix_lens + first_row)
    num_prefix_blocks = (prefix_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    stop = tl.minimum(tl.load(item + 4), kv_len)

    # Row m of the matrix: query head m % G of the item's row m // G.
    m = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + m % GROUP
    live = m // GROUP < num_rows
    row = first_row + tl.where(live, m // GROUP, 0)
    token = tl.load(tokens + row).to(tl.int64)
    part = (tl.load(part_offsets + row) + tl.load(item + 2)).to(tl.int64)
    dk = tl.arange(0, DK_PAD)
    dv = tl.arange(0, DV_PAD)
    q = tl.load(
        queries + (token * q_stride_token + head * q_stride_head)[:, None] + dk[None, :],
        mask=live[:, None] & (dk < DK)[None, :],
        other=0.0,
    ).to(keys.dtype.element_ty)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    lowest = 0
    begin = start
    if WINDOW > 0:
        lowest = tl.maximum(kv_len - WINDOW, 0)
        begin = start + tl.maximum(lowest - start, 0) // BLOCK_N * BLOCK_N
    for tile in range(begin, stop, BLOCK_N):
        t = tile + tl.arange(0, BLOCK_N)
        seen = (t < stop) & (t >= lowest)
        own = t >= prefix_len
        offset = tl.where(own, t - prefix_len, t)
        entry = offset // BLOCK_SIZE + tl.where(own, num_prefix_blocks, 0)
        block = tl.load(block_table + first_row * table_width + entry, mask=seen, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + offset % BLOCK_SIZE
        k = tl.load(  # [DK_PAD, BLOCK_N]
            keys + (slot * k_stride_slot + kv_head * k_stride_head)[None, :] + dk[:, None],
            mask=seen[None, :] & (dk < DK)[:, None],
            other=0.0,
        )
        v = tl.load(  # [BLOCK_N, DV_PAD]
            values + (slot * v_stride_slot + kv_head * v_stride_head)[:, None] + dv[None, :],
            mask=seen[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP > 0:  # tanh by the exponential: 1 - 2 / (e^2x + 1)
            twice = tl.exp2(scores * (2 * LOG2E / SOFTCAP))
            scores = SOFTCAP * (1 - 2 / (twice + 1))
        scores = tl.where(seen[None, :], scores * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a tile in which nothing is seen
        p = tl.exp2(scores - base[:, None])
        faded = tl.exp2(top - base)
        total = total * faded + tl.sum(p, 1)
        acc = acc * faded[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher

    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    where = part * num_query_heads + head
    tl.store(partial_lse + where, lse, mask=live)
    tl.store(
        partial_out + where[:, None] * DV + dv[None, :],
        out,
        mask=live[:, None] & (dv < DV)[None, :],
    )


def decode_partials(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: WorkTables,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial results [N, Hq, Dv] and their log-sum-exps [N, Hq] to base 2, float32.

    `queries` [T, Hq, Dk], `keys` [S, H, Dk], `values` [S, H, Dv], all with a last stride of 1. `tiles` are for
    measurements: an item of the tables must not have more rows than they hold.
    """
    (_, Hq, DK), (_, H, DV) = queries.shape, values.shape
    assert max(DK, DV) <= MAX_HEAD_DIM, "the backend has other means for wider heads"
    assert queries.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    partial_out = queries.new_empty(tables.shape.num_parts, Hq, DV, dtype=torch.float32)
    partial_lse = queries.new_empty(tables.shape.num_parts, Hq, dtype=torch.float32)
    tiles = tiles or Tiles.of(queries, keys, values)
    _decode_partials_kernel[(H, tables.shape.num_items)](
        queries,
        keys,
        values,
        partial_out,
        partial_lse,
        tables.items,
        tables.tokens,
        tables.kv_lens,
        tables.prefix_lens,
        tables.part_offsets,
        tables.block_table,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        tables.shape.table_width,
        scale,
        Hq,
        GROUP=Hq // H,
        DK=DK,
        DV=DV,
        DK_PAD=_padded(DK),
        DV_PAD=_padded(DV),
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        ITEM_FIELDS=NUM_ITEM_FIELDS,
        LOG2E=LOG2_E,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,  # said, because triton's default changes
    )
    return partial_out, partial_lse


def decode_partials_in_torch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: WorkTables,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What `decode_partials` must equal: item by item, row by row, in float32 or the queries' float64."""
    Hq, DV = queries.shape[1], values.shape[2]
    work = torch.promote_types(queries.dtype, torch.float32)
    out = torch.zeros(tables.shape.num_parts, Hq, DV, dtype=work, device=queries.device)
    lse = torch.full(out.shape[:2], -math.inf, dtype=work, device=queries.device)
    for first_row, num_rows, part, start, stop in tables.items.tolist():
        for row in range(first_row, first_row + num_rows):
            kv_len, prefix_len = int(tables.kv_lens[row]), int(tables.prefix_lens[row])
            lowest = 0 if window is None else max(0, kv_len - window)
            t = torch.arange(max(start, lowest), max(start, lowest, min(stop, kv_len)))
            own = t >= prefix_len
            offset = torch.where(own, t - prefix_len, t)
            entry = offset // block_size + torch.where(own, -(-prefix_len // block_size), 0)
            table = tables.block_table[row].cpu().long()
            slots = (table[entry] * block_size + offset % block_size).to(keys.device)
            group = Hq // keys.shape[1]
            k = keys[slots].to(work).repeat_interleave(group, dim=1)  # [L, Hq, Dk]
            v = values[slots].to(work).repeat_interleave(group, dim=1)  # [L, Hq, Dv]
            q = queries[int(tables.tokens[row])].to(work)  # [Hq, Dk]
            scores = torch.einsum("hd,lhd->hl", q, k) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            at = int(tables.part_offsets[row]) + part
            lse[at] = scores.logsumexp(-1) * LOG2_E
            out[at] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
    return out, lse
