"""One result per row and query head from its partial ones: the second of the two decode kernels.

Launched by the engine thread right after `decode_partials`. A program takes one row and one query head and
weighs the row's chunks by their log-sum-exps, in the order of the row's parts and a fixed number at a time, so
that the bits depend on the row alone. A layer's sinks take part here: they belong to the row, not to a chunk.

R rows, Hq query heads, Dv head dim, N partial results.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202
# (triton compiles annotations too, and takes none but its own; where it is absent `jit` is of no known type)

from __future__ import annotations

import itertools
import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.decode_partials import LOG2_E
from server.kernels.work_tables import WorkTables

_PARTS_AT_ONCE: Final = 8


@triton.jit
def _merge_partials_kernel(
    partial_out,  # [N, Hq, Dv] float32
    partial_lse,  # [N, Hq] float32, base 2
    sinks,  # [Hq], read if HAS_SINKS
    out,  # [T, Hq, Dv]
    tokens,
    part_offsets,
    out_stride_token,
    out_stride_head,
    num_query_heads,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    LOG2E: tl.constexpr,
    PARTS: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1)
    token = tl.load(tokens + row).to(tl.int64)
    if token < 0:
        return
    first = tl.load(part_offsets + row)
    last = tl.load(part_offsets + row + 1)
    top = tl.full([], float("-inf"), tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
    sink = top
    for group in range(first, last, PARTS):
        part = group + tl.arange(0, PARTS)
        where = part.to(tl.int64) * num_query_heads + head
        lse = tl.load(partial_lse + where, mask=part < last, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse, 0))
    top = tl.where(top == float("-inf"), 0.0, top)  # of a row that went non-finite
    total = tl.zeros([], tl.float32)
    if HAS_SINKS:
        total = tl.exp2(sink - top)
    d = tl.arange(0, DV_PAD)
    acc = tl.zeros([DV_PAD], tl.float32)
    for group in range(first, last, PARTS):
        part = group + tl.arange(0, PARTS)
        where = part.to(tl.int64) * num_query_heads + head
        lse = tl.load(partial_lse + where, mask=part < last, other=float("-inf"))
        weight = tl.exp2(lse - top)
        chunk = tl.load(
            partial_out + where[:, None] * DV + d[None, :],
            mask=(part < last)[:, None] & (d < DV)[None, :],
            other=0.0,
        )
        total += tl.sum(weight, 0)
        acc += tl.sum(weight[:, None] * chunk, 0)
    at = out + token * out_stride_token + head * out_stride_head + d
    merged = acc / tl.where(
        first == last, 1.0, total
    )  # a row of a graph's that only fills it: zeros
    tl.store(at, merged.to(out.dtype.element_ty), mask=d < DV)


def merge_partials(
    partial_out: Tensor,
    partial_lse: Tensor,
    tables: WorkTables,
    out: Tensor,
    *,
    sinks: Tensor | None = None,
) -> None:
    """Writes each row's result into `out` [T, Hq, Dv] at the row's token; `sinks` [Hq] are natural logits.

    Zeros for a row without parts; nothing for rows that only fill the tables, whose token is -1.
    """
    _, Hq, DV = partial_out.shape
    assert out.stride(-1) == 1
    _merge_partials_kernel[(Hq, tables.shape.num_rows)](
        partial_out,
        partial_lse,
        partial_lse if sinks is None else sinks,
        out,
        tables.tokens,
        tables.part_offsets,
        out.stride(0),
        out.stride(1),
        Hq,
        DV=DV,
        DV_PAD=triton.next_power_of_2(DV),
        HAS_SINKS=sinks is not None,
        LOG2E=LOG2_E,
        PARTS=_PARTS_AT_ONCE,
        num_warps=1,
        enable_fp_fusion=True,  # said, because triton's default changes
    )


def merge_partials_in_torch(
    partial_out: Tensor,
    partial_lse: Tensor,
    tables: WorkTables,
    out: Tensor,
    *,
    sinks: Tensor | None = None,
) -> None:
    """What `merge_partials` must equal: a softmax over a row's log-sum-exps, its sink beside them."""
    offsets = tables.part_offsets.tolist()
    for row, (first, last) in enumerate(itertools.pairwise(offsets)):
        token = int(tables.tokens[row])
        if token < 0:
            continue
        if first == last:
            out[token] = 0
            continue
        logits = partial_lse[first:last] * math.log(2)  # [parts, Hq]
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(logits)[None]])
        weights = logits.softmax(0)[: last - first]
        merged = (weights[:, :, None] * partial_out[first:last]).sum(0)
        out[token] = merged.to(out.dtype)
