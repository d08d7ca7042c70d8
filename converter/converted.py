"""What every format's reader returns, and the pieces that several of them need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from converter.errors import ConversionRefused
from prefix_store.importers.native import LayerTensors
from prefix_store.importers.soft_prompt import SoftPrompt

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
}


@dataclass(frozen=True)
class Converted:
    """A prefix on its way to a file.

    `blocks`: tensors by attention ("dec_self", "enc_self", "dec_cross"); or `soft`, still to be baked.
    `token_start`: position of a request's first own token; None means P. `model_type`, `k_space`: of the
    base, where the source itself says it, so that no `--base` is needed.
    """

    format: str
    recognised: str
    blocks: Mapping[str, LayerTensors] = field(default_factory=dict)
    soft: SoftPrompt | None = None
    token_start: int | None = None
    model_type: str | None = None
    k_space: Literal["post_rope", "none"] = "none"
    vocab_size: int | None = None
    assumed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    details: dict[str, JsonValue] = field(default_factory=dict)


def split_slots(rows: Tensor, num_layers: int, num_heads: int, what: str) -> LayerTensors:
    """`[P, 2 * L * H * D]`: slot 2l of a row is layer l's K, slot 2l + 1 its V."""
    num_tokens, width = rows.shape
    if width % (2 * num_layers * num_heads):
        raise ConversionRefused(
            f"{what}: rows of {width} elements do not divide into 2 x {num_layers} layers x {num_heads} heads"
        )
    slots = rows.view(num_tokens, 2 * num_layers, num_heads, -1)
    keys = [slots[:, 2 * layer].contiguous() for layer in range(num_layers)]
    values = [slots[:, 2 * layer + 1].contiguous() for layer in range(num_layers)]
    return keys, values


def evaluate_mlp(
    embeddings: Tensor, state: Mapping[str, Tensor], name: str, activation: str = "tanh"
) -> Tensor:
    """The rows `[P, width]` that the reparametrisation `name.0`, `name.2`, ... makes of `[P, mid]`.

    Linear layers with `activation` between them, as Li & Liang, P-tuning v2 and adapter-hub train them.
    """
    layers = sorted(
        int(key.removeprefix(f"{name}.").split(".")[0])
        for key in state
        if key.startswith(f"{name}.") and key.endswith(".weight")
    )
    if not layers or activation not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ConversionRefused(
            f"{name}: expected linear layers with one of {expected} between them, "
            f"got {len(layers)} layers and {activation!r}"
        )
    rows = embeddings.double()
    for index, layer in enumerate(layers):
        if index:
            rows = ACTIVATIONS[activation](rows)
        weight, bias = state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"]
        if weight.shape[1] != rows.shape[1]:
            raise ConversionRefused(
                f"{name}.{layer}: takes {weight.shape[1]} inputs, gets {rows.shape[1]}"
            )
        rows = rows @ weight.double().T + bias.double()
    return rows.float()


def whole_number(config: Mapping[str, object], *names: str) -> int:
    """The first of these fields that is a positive integer. Raises `ConversionRefused`."""
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    raise ConversionRefused(f"the configuration has no {' or '.join(names)}")
