"""Which PEFT adapter a bare tensor can be, told from its shape and the resident model's geometry.

PEFT writes no type, no base and no head count into `adapter_model.safetensors`; the width of a row is all
there is. Knows nothing of torch. Pure functions on any thread; called by `importers.peft`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prefix_store.errors import AmbiguousFormat, ImportRefused
from prefix_store.spec import BaseSpec

PREFIX_TYPES: Final = ("PREFIX_TUNING", "CARTRIDGE")
SOFT_TYPES: Final = ("PROMPT_TUNING", "P_TUNING", "CPT")
MULTITASK: Final = "MULTITASK_PROMPT_TUNING"
PEFT_TYPES: Final = (*PREFIX_TYPES, *SOFT_TYPES, MULTITASK)


@dataclass(frozen=True, slots=True)
class RowGeometry:
    """How PEFT lays a prefix row out: `2 * num_layers` slots of `num_heads * head_dim`, K and V in turn.

    The widest layer decides; narrower layers read the first heads and elements of their slot.
    """

    num_layers: int
    num_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return 2 * self.num_layers * self.num_heads * self.head_dim

    def __str__(self) -> str:
        return f"2 x {self.num_layers} layers x {self.num_heads} kv heads x {self.head_dim}"


def row_geometry(base: BaseSpec) -> RowGeometry:
    """What PEFT would train for `base`. Raises `ImportRefused` where PEFT can not express it."""
    layers = base.layout.layers
    if any(layer.key_dim != layer.value_dim for layer in layers):
        raise ImportRefused.at(
            "/tensors/prompt_embeddings",
            "the base model's keys and values differ in their head dimension; a PEFT prefix has one for both",
        )
    # PEFT provisions the heads of the layer with the widest head, as transformers' Gemma 4 has them.
    widest = max(layers, key=lambda layer: (layer.key_dim, layer.num_kv_heads))
    return RowGeometry(len(layers), widest.num_kv_heads, widest.key_dim)


def is_prefix(width: int, base: BaseSpec, peft_type: str | None) -> bool:
    """Whether rows of `width` are K/V of all layers (True) or embeddings (False).

    `peft_type` decides where both fit. Raises `AmbiguousFormat` or `ImportRefused`.
    """
    expected = row_geometry(base)
    fits = {"prefix": width == expected.width, "soft": width == base.hidden_size}
    wanted = None if peft_type is None else "prefix" if peft_type in PREFIX_TYPES else "soft"
    if wanted is None and all(fits.values()):
        raise AmbiguousFormat.at(
            "/tensors/prompt_embeddings/shape",
            f"rows of {width} elements are as wide as a prefix of the base model ({expected}) and as one of "
            f"its embeddings: say which with peft_type, one of {', '.join(PEFT_TYPES)}",
        )
    if not (fits[wanted] if wanted else any(fits.values())):
        _refuse_width(width, base, expected)
    return wanted == "prefix" if wanted else fits["prefix"]


def _refuse_width(width: int, base: BaseSpec, expected: RowGeometry) -> None:
    """Says what the rows would have fitted, where that can be told."""
    pointer = "/tensors/prompt_embeddings/shape"
    wanted = f"expected {expected.width} ({expected}) for a prefix"
    if base.hidden_size is not None:
        wanted += f" or {base.hidden_size} for a soft prompt"
    came = f"rows of {width} elements; {wanted}"
    heads = base.num_attention_heads
    per_layer = 2 * expected.num_heads * expected.head_dim
    per_head = 2 * expected.num_layers * expected.head_dim
    if heads is not None and heads != expected.num_heads and width == per_head * heads:
        came += (
            f". These hold one head per attention head ({heads}), as PEFT wrote before it supported "
            f"grouped-query attention; the base model has {expected.num_heads} key/value heads"
        )
    elif width % per_layer == 0:
        came += f". These fit {width // per_layer} layers, the base model has {expected.num_layers}"
    raise ImportRefused.at(pointer, came)
