"""How a model turns its keys with their position: found among its own frequencies, proved by a forward pass.

Frequencies come from the model's buffers, whatever scaling made them; which of them a layer uses, and how it
pairs a key's elements, is told by the keys of one token at two positions. Runs once at start, on the main
thread, before the engine owns the model; called by `base_spec`.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from prefix_store.rebase import rotated
from prefix_store.spec import LayerRotary
from server.model.loader import LoadedModel

_DISTANCE: Final = 37  # positions between the two; far enough for the slower pairs to turn visibly
_TOLERANCE: Final = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}


def find_rotary(model: LoadedModel) -> tuple[LayerRotary, ...] | None:
    """The rotation of each layer's keys; None if one layer's is none that we know."""
    candidates = _candidates(model.module)
    if model.position_limit is not None and model.position_limit <= _DISTANCE:
        return None
    found = []
    for keys in _keys_at_two_positions(model):
        best = min(candidates, key=lambda c: _difference(keys, c), default=None)
        if best is None or _difference(keys, best) > _TOLERANCE[model.layout.dtype]:
            return None
        found.append(best)
    return tuple(found)


def _candidates(module: nn.Module) -> list[LayerRotary]:
    """Every set of frequencies that the model holds, in both ways to pair elements."""
    frequencies = {
        tuple(buffer.double().tolist())
        for name, buffer in module.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }
    return [
        LayerRotary(f, interleaved) for f in sorted(frequencies) for interleaved in (False, True)
    ]


def _difference(keys: Tensor, rotary: LayerRotary) -> float:
    """How far the keys [2, H, D] of one token are from each other, turned; relative to the largest."""
    if 2 * len(rotary.inverse_frequencies) > keys.shape[-1]:
        return float("inf")
    turned = rotated(keys[:1].double(), _DISTANCE, rotary)
    return float((turned - keys[1:]).abs().max() / keys.abs().max().clamp_min(1e-30))


@torch.inference_mode()
def _keys_at_two_positions(model: LoadedModel) -> list[Tensor]:
    """Keys [2, H, D] per layer of the same token at position 0 and `_DISTANCE`.

    Attention gives zeros, so what reaches a layer depends on the token alone.
    """
    layers: dict[int, Tensor] = {}

    def note(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        layers[int(module.layer_idx)] = key[0].transpose(0, 1).double().cpu()  # type: ignore[arg-type]
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    ids = torch.ones(1, 2, dtype=torch.int64, device=model.device)
    positions = torch.tensor([[0, _DISTANCE]], device=model.device)
    with model.connected(note):
        model.module(input_ids=ids, position_ids=positions, use_cache=False)
    return [layers[index] for index in range(model.layout.num_layers)]
