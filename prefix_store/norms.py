"""How large the keys and values of a prefix are, layer by layer: what a person looks at first.

Keys far longer than those of ordinary tokens take all attention, far shorter ones get none. Pure functions on
any thread; called by `prefixd inspect` and by the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Mean L2 norm of one head's key and value vector in a layer, and the largest magnitude in either."""

    key: float
    value: float
    largest: float


def layer_norms(keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[LayerNorms, ...]:
    """One entry per layer of `keys[layer]`, `values[layer]`, each `[P, H_kv, D]`."""
    return tuple(
        LayerNorms(
            key=float(key.float().norm(dim=-1).mean()),
            value=float(value.float().norm(dim=-1).mean()),
            largest=max(float(key.float().abs().max()), float(value.float().abs().max())),
        )
        for key, value in zip(keys, values, strict=True)
    )
