"""The oracle: attention written out as the paper has it, one row at a time, in float32.

Slow on purpose and plain on purpose; runs on any device. Every other backend must agree with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.kvcache.kv_cache import LayerKV
from server.kvcache.to_device import to_device
from server.model.attention.base import AttentionParams
from server.model.forward_batch import ForwardBatch, RowSpan, causal_mask


class ReferenceAttention:
    """softmax(q k^T * scale) v, with softcap, window and sinks as written in their papers."""

    def attend(
        self, queries: Tensor, layer: LayerKV, params: AttentionParams, batch: ForwardBatch
    ) -> Tensor:
        """[T, Hq, Dk] -> [T, Hq, Dv]."""
        return torch.cat([attend_row(queries, layer, params, row) for row in batch.rows])


def attend_row(queries: Tensor, layer: LayerKV, params: AttentionParams, row: RowSpan) -> Tensor:
    """One row of a step's queries [T, Hq, Dk] -> [n, Hq, Dv]."""
    q = queries[row.first : row.first + row.num_tokens]  # [n, Hq, Dk]
    slots = to_device(row.kv_slots, queries.device)
    mask = causal_mask(row.num_tokens, row.kv_len, params.window, queries.device)
    return attend_exactly(q, layer.keys[slots], layer.values[slots], mask, params)


def attend_exactly(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, params: AttentionParams
) -> Tensor:
    """One row: q [n, Hq, Dk], k [L, H, Dk], v [L, H, Dv], mask [n, L] -> [n, Hq, Dv]."""
    group = queries.shape[1] // keys.shape[1]
    k = keys.float().repeat_interleave(group, dim=1)  # [L, Hq, Dk]
    v = values.float().repeat_interleave(group, dim=1)  # [L, Hq, Dv]
    scores = torch.einsum("nhd,lhd->hnl", queries.float(), k) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if params.sinks is not None:
        sinks = params.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, v).to(queries.dtype)
