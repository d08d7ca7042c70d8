"""What an attention backend must do, and the layer that calls it from inside a transformers model.

Runs on the engine thread during a forward pass. `PagedAttention` is what transformers calls (through
`AttentionInterface`); it writes the step's K/V into the pool, then has a backend attend over each row's
prefix and own tokens. Backends differ in speed only: one contract test suite runs over all of them.

T = tokens of the step, T' = those and what fills the pack (`PackShape`), Hq = query heads, H = kv heads, D = head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.functional import pad

from prefix_store.spec import KVLayout
from server.kvcache.kv_cache import KVCache, LayerKV
from server.model.forward_batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """How a layer attends. `sinks` [Hq]: learned logits that take part in the softmax and give nothing."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class AttentionBackend(Protocol):
    """Attends every token of a step over its row's keys in the pool.

    `queries` [T, Hq, Dk] -> [T, Hq, Dv]. Reads the pool, never writes it. Token i of a row with n tokens
    and `kv_len` keys sees keys 0 .. kv_len - n + i, inside the window if there is one.
    """

    def attend(
        self, queries: Tensor, layer: LayerKV, params: AttentionParams, batch: ForwardBatch
    ) -> Tensor: ...


@runtime_checkable
class RecordableBackend(Protocol):
    """A backend whose decode steps are the same launches on the same memory, whatever the rows are.

    What changes with the rows is in tensors that it gets by `ForwardBatch.derive`.
    """

    def can_be_recorded(self, layout: KVLayout) -> bool:
        """Whether that is so for all layers of this model."""
        ...


class PagedAttention:
    """The function that a transformers model calls in place of its own attention.

    Holds the step's `ForwardBatch` between `begin` and `end`; the runner sets it around each forward pass.
    It is not passed as a keyword because not every architecture hands keywords down.
    """

    def __init__(self, backend: AttentionBackend, kv_cache: KVCache) -> None:
        self._backend = backend
        self._kv_cache = kv_cache
        self._batch: ForwardBatch | None = None

    def begin(self, batch: ForwardBatch) -> None:
        """Opens a step."""
        self._batch = batch

    def end(self) -> None:
        """Closes it; a call outside of a step is our bug."""
        self._batch = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,  # [1, Hq, T', Dk], after the rotary embedding
        key: Tensor,  # [1, H, T', Dk]
        value: Tensor,  # [1, H, T', Dv]
        attention_mask: None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Output [1, T', Hq, Dv] and no weights, as `AttentionInterface` expects."""
        assert attention_mask is None, "the load-time probe refuses models that pass masks"
        batch = self._batch
        assert batch is not None, "the model was called outside of a step"
        layer = self._kv_cache.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        T = batch.num_tokens  # what only fills the pack has no place in the pool
        layer.write(
            batch.slot_mapping, key[0, :, :T].transpose(0, 1), value[0, :, :T].transpose(0, 1)
        )
        params = AttentionParams(
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
        out = self._backend.attend(query[0, :, :T].transpose(0, 1), layer, params, batch)
        if query.shape[2] > T:
            out = pad(out, (0, 0, 0, 0, 0, query.shape[2] - T))
        return out[None], None
