"""Whether decode steps are recorded once and replayed: where the device and the attention backend allow it.

Called by `server.bootstrap` at start; the engine thread asks what comes of it for every step (`ModelRunner`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from server.engine.messages import ScheduledRow
from server.kvcache.kv_cache import KVCache
from server.model.attention.base import AttentionBackend, PagedAttention, RecordableBackend
from server.model.loader import LoadedModel

logger = logging.getLogger(__name__)


class RecordedSteps(Protocol):
    """What performs steps of a kind faster than a forward pass does: `DecodeGraphs`."""

    def run(self, rows: Sequence[ScheduledRow]) -> tuple[Tensor, Tensor] | None:
        """Logits [len(rows), V] and the most probable token of each [len(rows)], or None: not a step of that kind."""
        ...


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
    if model.device.type != "cuda" or not isinstance(backend, RecordableBackend):
        return None
    if not backend.can_be_recorded(model.layout):
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
