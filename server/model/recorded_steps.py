"""Whether decode steps are recorded once and replayed: where the device and the attention backend allow it.

Called by `server.bootstrap` at start; the engine thread asks what comes of it for every step (`ModelRunner`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final, Protocol

from torch import Tensor

from prefix_store.spec import DTYPE_BYTES
from server.engine.messages import ScheduledRow
from server.kvcache.kv_cache import KVCache
from server.model.attention.base import AttentionBackend, PagedAttention, RecordableBackend
from server.model.fed_back_tokens import FedBackTokens
from server.model.loader import LoadedModel

logger = logging.getLogger(__name__)

MOST_PARTS: Final = 8192
"""Partial results of attention in a recorded step: 134 MB for 32 heads of 128."""


class RecordedSteps(Protocol):
    """What performs steps of a kind faster than a forward pass does: `DecodeGraphs`."""

    def run(
        self, rows: Sequence[ScheduledRow], fed_back: FedBackTokens
    ) -> tuple[Tensor, Tensor] | None:
        """Logits [len(rows), V] and the most probable token of each [len(rows)], or None: not a step of that kind."""
        ...


def can_record(model: LoadedModel, backend: AttentionBackend) -> bool:
    """Whether there is a device and a backend for it."""
    on_gpu = model.device.type == "cuda"
    return (
        on_gpu and isinstance(backend, RecordableBackend) and backend.can_be_recorded(model.layout)
    )


def recorded_bytes(model: LoadedModel, max_num_seqs: int) -> int:
    """What the graphs keep of the device's memory, about: logits twice, and the partial results of attention."""
    num_heads = model.num_attention_heads or max(x.num_kv_heads for x in model.layout.layers)
    widest = max(layer.value_dim for layer in model.layout.layers)
    logits = 2 * max_num_seqs * model.vocab_size * DTYPE_BYTES[model.layout.dtype]
    return logits + MOST_PARTS * num_heads * (widest + 1) * DTYPE_BYTES["float32"]


def record_decode_steps(
    model: LoadedModel,
    kv_cache: KVCache,
    attention: PagedAttention,
    backend: AttentionBackend,
    *,
    max_num_seqs: int,
    max_model_len: int,
) -> RecordedSteps | None:
    """CUDA graphs of all decode steps, which takes seconds; None where there can be none.

    A model whose forward pass can not be captured, as it waits for the device, is served without.
    """
    if not can_record(model, backend):
        return None
    from server.model.decode_graphs import CudaRecorder, DecodeGraphs

    graphs = DecodeGraphs(
        model,
        kv_cache,
        attention,
        CudaRecorder(),
        max_num_rows=max_num_seqs,
        max_model_len=max_model_len,
    )
    try:
        graphs.record()
    except RuntimeError:  # torch's only word for all that can go wrong with a capture
        logger.warning(
            "decode steps of %s can not be recorded as CUDA graphs; they will take longer",
            model.model_type,
            exc_info=True,
        )
        return None
    return graphs
