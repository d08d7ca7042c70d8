"""Attention on torch's fused kernel: any device, no compiler; the default on the CPU.

Two ideas make it fast there. The query heads that share a kv head are packed as query rows of that head,
so K and V are never repeated; and rows that decode one token are attended together, gathered per bucket
of K/V length. What the fused kernel lacks (softcap, sinks, keys and values of different width) goes to the
reference.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from server.kvcache.kv_cache import LayerKV
from server.model.attention.base import AttentionParams
from server.model.attention.reference import ReferenceAttention, attend_row
from server.model.forward_batch import DecodeGroup, ForwardBatch, PrefillRow


class SdpaAttention:
    """Gather, pack the query heads of a group, call the fused kernel."""

    def __init__(self) -> None:
        self._reference = ReferenceAttention()

    def attend(
        self, queries: Tensor, layer: LayerKV, params: AttentionParams, batch: ForwardBatch
    ) -> Tensor:
        """[T, Hq, Dk] -> [T, Hq, Dv]."""
        if not _fused(layer, params):
            return self._reference.attend(queries, layer, params, batch)
        out = queries.new_empty(*queries.shape[:2], layer.values.shape[-1])
        for index, group in enumerate(batch.decode_groups):
            mask = batch.decode_mask(index, params.window)
            out[group.tokens] = _decode(queries[group.tokens], layer, group, mask, params.scale)
        attend_prefill_rows(queries, layer, params, batch, out)
        return out


def attend_prefill_rows(
    queries: Tensor, layer: LayerKV, params: AttentionParams, batch: ForwardBatch, out: Tensor
) -> None:
    """Writes the results of the rows of several tokens into `out` [T, Hq, Dv]."""
    fused = _fused(layer, params)
    for index, row in enumerate(batch.prefill_rows):
        span = slice(row.first, row.first + row.num_tokens)
        if fused:
            mask = batch.prefill_mask(index, params.window)
            out[span] = _prefill(queries[span], layer, row, mask, params.scale)
        else:
            out[span] = attend_row(queries, layer, params, row)


def _fused(layer: LayerKV, params: AttentionParams) -> bool:
    """Whether torch fuses it. Its fallback is a batched product, whose bits depend on who else decodes."""
    alike = layer.keys.shape[-1] == layer.values.shape[-1]
    return alike and params.softcap is None and params.sinks is None


def _decode(
    queries: Tensor, layer: LayerKV, group: DecodeGroup, mask: Tensor, scale: float
) -> Tensor:
    """B rows of one token: q [B, Hq, Dk] -> [B, Hq, Dv]."""
    B, Hq, D = queries.shape
    H = layer.keys.shape[1]
    k = layer.keys[group.kv_slots].transpose(1, 2)  # [B, H, L, Dk]
    v = layer.values[group.kv_slots].transpose(1, 2)  # [B, H, L, Dv]
    q = queries.view(B, H, Hq // H, D)  # the heads of a group as rows
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(B, Hq, -1)


def _prefill(
    queries: Tensor, layer: LayerKV, row: PrefillRow, mask: Tensor, scale: float
) -> Tensor:
    """One row of n tokens: q [n, Hq, Dk] -> [n, Hq, Dv]."""
    n, Hq, D = queries.shape
    H = layer.keys.shape[1]
    G = Hq // H
    k = layer.keys[row.kv_slots].transpose(0, 1)[None]  # [1, H, L, Dk]
    v = layer.values[row.kv_slots].transpose(0, 1)[None]  # [1, H, L, Dv]
    q = queries.view(n, H, G, D).permute(1, 2, 0, 3).reshape(1, H, G * n, D)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(G, 1), scale=scale)
    return out.view(H, G, n, -1).permute(2, 0, 1, 3).reshape(n, Hq, -1)
