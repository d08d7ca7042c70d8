"""Prefill on CUDA by torch's own ragged flash attention, over keys and values gathered from the pool.

Runs on the engine thread, called by the triton backend for rows of several tokens. Gathering costs a copy of
K/V, which the products of a prefill outweigh by far. Not called with a block table: torch 2.11 has none, and
some later builds left rows unwritten with one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from server.kvcache.kv_cache import LayerKV
from server.kvcache.to_device import to_device
from server.model.attention.base import AttentionParams
from server.model.forward_batch import ForwardBatch


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    """torch's function, or None where this torch has none that takes a window. Its import takes seconds."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:
        return None
    # From torch 2.12 on it wants to be told what its kernel always did.
    if "enable_gqa" in parameters:
        return functools.partial(varlen_attn, enable_gqa=True)
    return varlen_attn


_DTYPES: Final = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM: Final = 256


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """The prefill rows of a step one after another. n = their tokens, L = their keys, over all rows."""

    tokens: Tensor  # [n] in the pack
    kv_slots: Tensor  # [L]
    token_offsets: Tensor  # [rows + 1] int32
    kv_offsets: Tensor  # [rows + 1] int32
    max_tokens: int
    max_kv_len: int

    @classmethod
    def of(cls, batch: ForwardBatch) -> RaggedRows:
        rows = batch.prefill_rows
        tokens = [torch.arange(row.first, row.first + row.num_tokens) for row in rows]
        return cls(
            tokens=to_device(torch.cat(tokens), batch.device),
            kv_slots=to_device(torch.cat([row.kv_slots for row in rows]), batch.device),
            token_offsets=_offsets([row.num_tokens for row in rows], batch.device),
            kv_offsets=_offsets([row.kv_len for row in rows], batch.device),
            max_tokens=max(row.num_tokens for row in rows),
            max_kv_len=max(row.kv_len for row in rows),
        )


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)


def can_attend(queries: Tensor, layer: LayerKV, params: AttentionParams) -> bool:
    """Whether torch's function takes these heads, this dtype and device, and the layer asks for no more than it has."""
    head_dim = layer.keys.shape[-1]
    return (
        queries.is_cuda
        and queries.dtype == layer.keys.dtype
        and queries.dtype in _DTYPES
        and head_dim == layer.values.shape[-1]
        and head_dim % 8 == 0
        and head_dim <= _MAX_HEAD_DIM
        and params.softcap is None
        and params.sinks is None
        and _varlen_attn() is not None
    )


def attend_ragged(
    queries: Tensor, layer: LayerKV, params: AttentionParams, batch: ForwardBatch, out: Tensor
) -> None:
    """Writes the results of the rows of several tokens into `out` [T, Hq, Dv]; `can_attend` has agreed."""
    attend = _varlen_attn()
    assert attend is not None
    rows = batch.derive(RaggedRows, lambda: RaggedRows.of(batch))
    # Its window is counted in keys before the token, ours with the token itself.
    left = -1 if params.window is None else params.window - 1
    out[rows.tokens] = attend(
        queries[rows.tokens],  # [n, Hq, D]
        layer.keys[rows.kv_slots],  # [L, H, D]
        layer.values[rows.kv_slots],
        rows.token_offsets,
        rows.kv_offsets,
        rows.max_tokens,
        rows.max_kv_len,
        scale=params.scale,
        window_size=(left, 0),
    )
