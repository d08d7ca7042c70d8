"""Attention on torch's fused kernel: any device, no compiler; the default on the CPU.

Two ideas make it fast there. The query heads that share a kv head are packed as query rows of that head,
so K and V are never repeated; and rows that decode one token are attended together, gathered per bucket
of K/V length. The tokens of a prompt are attended as if each were decoded alone, only that they share the gathered
keys: products of another shape would sum in another order, and a token's bits would tell how its prompt was cut, or
that it was computed again after a preemption. On a GPU, where linear layers tell that anyway, they are attended together. What the fused kernel lacks (softcap, sinks, keys and values of
different width) goes to the reference.

B = tokens attended in one call, L = their padded K/V length, G = query heads of a kv head.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from server.kvcache.kv_cache import LayerKV
from server.kvcache.to_device import to_device
from server.model.attention.base import AttentionParams
from server.model.attention.reference import ReferenceAttention, attend_row
from server.model.forward_batch import ForwardBatch, RowSpan, TokenGroup, causal_mask


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
        for group in batch.decode_groups:
            shape = (-1, group.length, *layer.keys.shape[1:])  # [B, L, H, D]
            keys = layer.keys.index_select(0, group.kv_slots).view(shape)
            values = layer.values.index_select(0, group.kv_slots).view(shape)
            out[group.tokens] = _attend(queries[group.tokens], keys, values, group, params)
        attend_prefill_rows(queries, layer, params, batch, out)
        return out


def attend_prefill_rows(
    queries: Tensor, layer: LayerKV, params: AttentionParams, batch: ForwardBatch, out: Tensor
) -> None:
    """Writes the results of the rows of several tokens into `out` [T, Hq, Dv]."""
    if not _fused(layer, params):
        for row in batch.prefill_rows:
            span = slice(row.first, row.first + row.num_tokens)
            out[span] = attend_row(queries, layer, params, row)
        return
    if queries.is_cuda:
        for row in batch.prefill_rows:
            span = slice(row.first, row.first + row.num_tokens)
            out[span] = attend_together(queries, layer, params, row)
        return
    for group in batch.prefill_groups:
        keys = layer.keys.index_select(0, group.kv_slots)[None]  # [1, L, H, D]
        values = layer.values.index_select(0, group.kv_slots)[None]
        for stretch in group.stretches:
            k, v = keys[:, : stretch.length], values[:, : stretch.length]
            out[stretch.tokens] = _attend(queries[stretch.tokens], k, v, stretch, params)


def attend_together(
    queries: Tensor, layer: LayerKV, params: AttentionParams, row: RowSpan
) -> Tensor:
    """All tokens of one row in one call, of a step's queries [T, Hq, D] -> [n, Hq, D]."""
    n, Hq, D = row.num_tokens, *queries.shape[1:]
    H = layer.keys.shape[1]
    slots = to_device(row.kv_slots, queries.device)
    keys = layer.keys.index_select(0, slots).transpose(0, 1)[None]  # [1, H, L, D]
    values = layer.values.index_select(0, slots).transpose(0, 1)[None]
    q = queries[row.first : row.first + n].view(n, H, Hq // H, D)
    q = q.permute(1, 2, 0, 3).reshape(1, H, Hq // H * n, D)  # the heads of a group as rows
    mask = causal_mask(n, row.kv_len, params.window, queries.device).repeat(Hq // H, 1)
    attended = scaled_dot_product_attention(q, keys, values, mask, scale=params.scale)
    return attended.view(H, Hq // H, n, D).permute(2, 0, 1, 3).reshape(n, Hq, D)


def _fused(layer: LayerKV, params: AttentionParams) -> bool:
    """Whether torch fuses it. Its fallback is a batched product, whose bits depend on who else decodes."""
    alike = layer.keys.shape[-1] == layer.values.shape[-1]
    return alike and params.softcap is None and params.sinks is None


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, group: TokenGroup, params: AttentionParams
) -> Tensor:
    """B tokens: q [B, Hq, D], k and v [B or 1, L, H, D] -> [B, Hq, D]."""
    B, Hq, D = queries.shape
    H = keys.shape[2]
    q = queries.view(B, H, Hq // H, D)  # the heads of a group as rows
    k = keys.transpose(1, 2).expand(B, -1, -1, -1)
    v = values.transpose(1, 2).expand(B, -1, -1, -1)
    mask = group.mask(params.window, queries.dtype)
    return scaled_dot_product_attention(q, k, v, mask, scale=params.scale).view(B, Hq, D)
