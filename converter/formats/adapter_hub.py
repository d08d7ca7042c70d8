"""adapter-hub's `adapters`: prefix tuning, where a KV cache can express it.

That library joins the prefix behind the repetition of key/value heads, so it has one head per attention
head: with grouped-query attention there is nothing to convert to. Gates depend on the input and are refused.
"""

from __future__ import annotations

import re
from typing import Any, Final

from torch import Tensor

from converter.checkpoints import tensors_of
from converter.converted import Converted, evaluate_mlp, split_slots
from converter.errors import ConversionRefused
from converter.source import Source
from prefix_store.spec import BaseSpec

_PREFIX: Final = re.compile(r"(?:.*\.)?prefix_tunings\.[^.]+\.([^.]+)\.(.+)")


def is_adapter_hub(config: dict[str, Any]) -> bool:
    """Whether this is the configuration of a prefix of the `adapters` library."""
    inner = config.get("config")
    return isinstance(inner, dict) and inner.get("architecture") == "prefix_tuning"


def read_adapter_hub(source: Source, base: BaseSpec) -> Converted:
    """Raises `ConversionRefused` for gates, other locations than self-attention, and grouped heads."""
    settings: dict[str, Any] = source.config["config"]
    tensors = tensors_of(source.state, source.weights.name)
    if settings.get("use_gating") or any("prefix_gates" in name for name in tensors):
        raise ConversionRefused("a gated prefix: its weight depends on the input (use_gating)")
    if len({(x.num_kv_heads, x.key_dim, x.value_dim) for x in base.layout.layers}) > 1:
        raise ConversionRefused(
            "the base's layers differ in shape, which this format can not express"
        )
    heads, kv_heads = base.num_attention_heads, base.layout.layers[0].num_kv_heads
    if heads != kv_heads:
        raise ConversionRefused(
            f"the prefix has one head per attention head ({heads}); the base has {kv_heads} key/value "
            "heads, so its KV cache can not hold it"
        )
    part = _self_attention(tensors)
    rows = _rows(part, settings)
    layers = base.layout.num_layers
    if rows.shape[1] != 2 * layers * kv_heads * base.layout.layers[0].key_dim:
        raise ConversionRefused(
            f"rows of {rows.shape[1]} elements; expected 2 x {layers} layers x {kv_heads} heads x "
            f"{base.layout.layers[0].key_dim}"
        )
    return Converted(
        format="adapter-hub",
        recognised=f"adapter-hub prefix tuning: [{rows.shape[0]}, {rows.shape[1]}]",
        blocks={"dec_self": split_slots(rows, layers, kv_heads, "control_trans")},
        token_start=0,
        assumed=("requests start at position 0, as the adapters library has it",),
    )


def _self_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the one location, without their path."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PREFIX.fullmatch(name)
        if match is None:
            raise ConversionRefused(f"unexpected tensor {name[:96]!r} in a prefix tuning adapter")
        found.setdefault(match[1], {})[match[2]] = tensor
    if len(found) != 1 or any("cross" in place or "encoder" in place for place in found):
        places = ", ".join(sorted(found))
        raise ConversionRefused(f"prefixes at {places}: expected one, of self-attention")
    return next(iter(found.values()))


def _rows(part: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    flat, length = part.get("control_trans"), settings.get("prefix_length")
    if flat is not None:
        if type(length) is not int or length < 1 or flat.numel() % length:
            raise ConversionRefused(
                f"control_trans has {flat.numel()} elements, prefix_length is {length!r}"
            )
        return flat.reshape(length, -1)
    weight = part.get("wte.weight")
    if weight is None:
        raise ConversionRefused("expected wte.weight and control_trans, or a flat control_trans")
    return evaluate_mlp(weight, part, "control_trans", str(settings.get("non_linearity", "tanh")))
