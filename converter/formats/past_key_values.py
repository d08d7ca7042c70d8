"""A transformers cache that somebody saved: one key and one value tensor per layer, names as they come.

`key_cache.0`, `0.keys`, `layers.3.value`, `past_key_values.3.k`, ...; `[1, H_kv, P, D]` or `[H_kv, P, D]`.
"""

from __future__ import annotations

import re
from typing import Final

from torch import Tensor

from converter.checkpoints import tensors_of
from converter.converted import Converted
from converter.errors import ConversionRefused
from converter.source import Source

_LAYER_FIRST: Final = re.compile(r"(?:[a-z_]+\.)*(\d{1,3})\.(k|v|key|value|keys|values)")
_PART_FIRST: Final = re.compile(
    r"(?:[a-z_]+\.)*(k|v|key|value|keys|values)(?:_cache)?[._](\d{1,3})"
)


def layer_and_part(name: str) -> tuple[int, str] | None:
    """(3, "k") for any of the names above; None for others."""
    if match := _LAYER_FIRST.fullmatch(name):
        return int(match[1]), match[2][0]
    if match := _PART_FIRST.fullmatch(name):
        return int(match[2]), match[1][0]
    return None


def is_cache(names: list[str]) -> bool:
    """Whether all names are those of a saved cache."""
    return bool(names) and all(layer_and_part(name) for name in names)


def read_past_key_values(source: Source) -> Converted:
    """Raises `ConversionRefused` for layers that are missing or of another shape."""
    found: dict[tuple[int, str], Tensor] = {}
    for name, tensor in tensors_of(source.state, source.weights.name).items():
        place = layer_and_part(name)
        assert place is not None, "the format was recognised by its names"
        if place in found:
            raise ConversionRefused(f"layer {place[0]} has two tensors of {place[1]}")
        found[place] = _token_major(name, tensor)
    num_layers = len(found) // 2
    missing = [
        f"{part} of layer {layer}"
        for layer in range(num_layers)
        for part in "kv"
        if (layer, part) not in found
    ]
    if missing or len(found) % 2:
        raise ConversionRefused(
            f"expected k and v of layers from 0, missing {missing[:1] or 'one'}"
        )
    keys = [found[layer, "k"] for layer in range(num_layers)]
    values = [found[layer, "v"] for layer in range(num_layers)]
    return Converted(
        format="past-key-values",
        recognised=f"saved key/value cache: {num_layers} layers, {keys[0].shape[0]} tokens",
        blocks={"dec_self": (keys, values)},
        assumed=("the cache began at position 0; requests start behind it",),
    )


def _token_major(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 3:
        raise ConversionRefused(
            f"{name} {list(tensor.shape)}: expected [1, H_kv, P, D] or [H_kv, P, D]"
        )
    return tensor.transpose(0, 1).contiguous()
