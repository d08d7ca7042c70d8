"""HazyResearch Cartridges: `cache-*.pt`, both dialects (`fixed_*` until June 2025, `frozen_*` since).

Per layer one tensor `[1, H_kv, T, D]` of trainable rows and, before them, frozen ones (attention sinks).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from converter.converted import Converted
from converter.errors import ConversionRefused
from converter.source import Source

DIALECTS = {"fixed": "A", "frozen": "B"}


def read_cartridge(source: Source) -> Converted:
    """Frozen and trainable rows joined. Raises `ConversionRefused`."""
    state = source.state
    dialects = [name for name in DIALECTS if f"{name}_keys" in state]
    if len(dialects) > 1:
        raise ConversionRefused("the file has fixed_keys and frozen_keys, expected one of the two")
    frozen = dialects[0] if dialects else None
    known = {"trainable_keys", "trainable_values"}
    known |= {f"{frozen}_keys", f"{frozen}_values"} if frozen else set()
    unknown = sorted(state.keys() - known)
    if unknown:
        raise ConversionRefused(f"unexpected entry {str(unknown[0])[:64]!r} beside the cartridge")
    keys = _joined(state, frozen, "keys")
    values = _joined(state, frozen, "values")
    if len(keys) != len(values):
        raise ConversionRefused(f"{len(keys)} layers of keys, {len(values)} of values")
    num_frozen = _num_rows(state, frozen)
    return Converted(
        format="cartridges",
        recognised=(
            f"HazyResearch cartridge, dialect {DIALECTS[frozen] if frozen else 'without frozen rows'}: "
            f"{len(keys)} layers, {keys[0].shape[0]} tokens, {num_frozen} of them frozen"
        ),
        blocks={"dec_self": (keys, values)},
        assumed=("keys carry the rotary embedding of positions 0 to P-1; requests start at P",),
        details={"num_frozen_tokens": num_frozen},
    )


def _joined(state: dict[str, Any], frozen: str | None, part: str) -> list[Tensor]:
    trainable = _layers(state, f"trainable_{part}")
    before = _layers(state, f"{frozen}_{part}") if frozen else []
    if before and len(before) != len(trainable):
        raise ConversionRefused(
            f"{frozen}_{part} has {len(before)} layers, trainable_{part} {len(trainable)}"
        )
    return [
        torch.cat([before[layer], rows]) if before else rows for layer, rows in enumerate(trainable)
    ]


def _layers(state: dict[str, Any], name: str) -> list[Tensor]:
    """`[1, H, T, D]` of each layer as `[T, H, D]`."""
    held = state.get(name)
    if not isinstance(held, nn.ParameterList | list | tuple):
        raise ConversionRefused(f"{name}: expected a list of tensors, one per layer")
    for tensor in held:
        if not isinstance(tensor, Tensor) or tensor.dim() != 4 or tensor.shape[0] != 1:
            raise ConversionRefused(f"{name}: expected tensors of the shape [1, H_kv, T, D]")
    return [tensor.detach()[0].transpose(0, 1).contiguous() for tensor in held]


def _num_rows(state: dict[str, Any], frozen: str | None) -> int:
    layers = _layers(state, f"{frozen}_keys") if frozen else []
    return int(layers[0].shape[0]) if layers else 0
