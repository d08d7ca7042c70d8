"""A prefix as transformers takes it: a cache that begins with it and keeps nothing that comes after, or one that notes
what a prompt leaves.

Called by `base` for each forward pass, on the main thread. Transformers' own cache would append every batch's keys
and values to itself. Here a layer gives back prefix and tokens joined and stays as it was: one prefix serves
every batch of a step, gradients flow into it, and a layer may run twice (activation checkpointing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, slots=True, eq=False)
class KeyValues:
    """A prefix: `keys[layer]` is `[P, H_kv, D_k]` behind the rotary embedding, `values[layer]` is `[P, H_kv, D_v]`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.keys[0].shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All keys, then all values, each in the order of the layers."""
        return (*self.keys, *self.values)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> KeyValues:
        """The inverse of `tensors`."""
        half = len(tensors) // 2
        return cls(tuple(tensors[:half]), tuple(tensors[half:]))

    def detached(self) -> KeyValues:
        """The same values without their history."""
        return KeyValues.of([tensor.detach() for tensor in self.tensors])

    def rows(self, start: int, stop: int) -> KeyValues:
        """Tokens `start`..`stop - 1` of the prefix."""
        return KeyValues.of([tensor[start:stop] for tensor in self.tensors])


class _PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's prefix, `[1, H_kv, P, D]`. Never written to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Prefix and tokens `[B, H_kv, P + T, D]`. The prefix is repeated only as a view, then copied by the join."""
        shape = (key_states.shape[0], -1, -1, -1)
        return (
            torch.cat([self.keys.expand(shape), key_states], dim=-2),
            torch.cat([self.values.expand(shape), value_states], dim=-2),
        )


class _NotingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of an empty cache: notes the first keys and values that it is given, `[1, H_kv, P, D]`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        return key_states, value_states


def noting_cache() -> Any:
    """A transformers cache for one pass over a whole prompt; its `layers` hold what the prompt left."""
    return Cache(layer_class_to_replicate=_NotingLayer)


def prefix_cache(prefix: KeyValues, dtype: torch.dtype) -> Any:
    """A transformers cache that begins with `prefix` in every row, in the base model's `dtype`."""
    layers = [
        _PrefixLayer(key.transpose(0, 1)[None].to(dtype), value.transpose(0, 1)[None].to(dtype))
        for key, value in zip(prefix.keys, prefix.values, strict=True)
    ]
    return Cache(layers=layers)
