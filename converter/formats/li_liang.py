"""Directories of the original Prefix-Tuning code (Li & Liang 2021), whose files hold the MLP unevaluated.

GPT-2: one prefix, tokens behind it. BART: three (decoder, cross-attention, encoder), tokens at 0. The
variants without an MLP hold the rows themselves, or (`init_shallow_word`) a cache `[2L, 1, H, P, D]`.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from converter.checkpoints import tensors_of
from converter.converted import (
    Converted,
    evaluate_mlp,
    split_slots,
    whole_number,
)
from converter.errors import ConversionRefused
from converter.source import Source
from prefix_store.importers.native import LayerTensors

# Block -> the names of its embedding and its MLP.
BART_BLOCKS: Final = {
    "dec_self": ("wte", "control_trans"),
    "dec_cross": ("wte2", "control_trans2"),
    "enc_self": ("wte_enc", "control_trans_enc"),
}


def read_gpt2(source: Source) -> Converted:
    """Raises `ConversionRefused`; infixes depend on the input and are refused."""
    tensors, config = tensors_of(source.state, source.weights.name), source.config
    _refuse_infix(config, tensors)
    layers, heads = whole_number(config, "n_layer"), whole_number(config, "n_head")
    blocks = {"dec_self": _block(tensors, "wte", "control_trans", layers, heads, config)}
    return Converted(
        format="li-liang-gpt2",
        recognised=f"Li & Liang prefix for GPT-2: {_how(tensors)}, {layers} layers, {heads} heads",
        blocks=blocks,
        model_type="gpt2",
        vocab_size=config.get("vocab_size") if isinstance(config.get("vocab_size"), int) else None,
        assumed=("requests start behind the prefix, as its GPT-2 code has it",),
        details=_details(config),
    )


def read_bart(source: Source) -> Converted:
    """Three blocks, decoder and encoder tokens from position 0. Raises `ConversionRefused`."""
    tensors, config = tensors_of(source.state, source.weights.name), source.config
    blocks = {}
    for block, (embedding, mlp) in BART_BLOCKS.items():
        side = "encoder" if block == "enc_self" else "decoder"
        layers = whole_number(config, f"{side}_layers")
        heads = whole_number(config, f"{side}_attention_heads")
        if not any(name.startswith(f"{mlp}.") for name in tensors):
            raise ConversionRefused(f"no tensors {mlp}.*: expected the prefix of {block}")
        blocks[block] = _block(tensors, embedding, mlp, layers, heads, config)
    return Converted(
        format="li-liang-bart",
        recognised=f"Li & Liang prefix for BART: {_how(tensors)}, blocks {', '.join(blocks)}",
        blocks=blocks,
        token_start=0,
        model_type=str(config.get("model_type", "bart")),
        assumed=("decoder and encoder tokens start at position 0, as its BART code has it",),
        details=_details(config),
    )


def _block(
    tensors: dict[str, Tensor],
    embedding: str,
    mlp: str,
    layers: int,
    heads: int,
    config: dict[str, Any],
) -> LayerTensors:
    flat = tensors.get(mlp)
    if flat is None:
        weight = tensors.get(f"{embedding}.weight")
        if weight is None:
            raise ConversionRefused(
                f"no tensor {embedding}.weight: expected the embedding of {mlp}"
            )
        return split_slots(evaluate_mlp(weight, tensors, mlp), layers, heads, mlp)
    if flat.dim() == 5:  # [2L, 1, H, P, D], a cache as transformers had it
        if flat.shape[:3] != (2 * layers, 1, heads):
            raise ConversionRefused(
                f"{mlp} {list(flat.shape)}: expected [{2 * layers}, 1, {heads}, P, D]"
            )
        slots = flat[:, 0].transpose(1, 2).contiguous()  # [2L, P, H, D]
        return list(slots[0::2]), list(slots[1::2])
    num_tokens = whole_number(config, "preseqlen")
    if flat.numel() % num_tokens:
        raise ConversionRefused(f"{mlp}: {flat.numel()} elements are no {num_tokens} rows")
    return split_slots(flat.reshape(num_tokens, -1), layers, heads, mlp)


def _refuse_infix(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if config.get("use_infix") is True or "wte2.weight" in tensors:
        raise ConversionRefused(
            "an infix depends on the request's own text; only prefixes can be stored"
        )


def _how(tensors: dict[str, Tensor]) -> str:
    linear = sum(n.startswith("control_trans.") and n.endswith(".weight") for n in tensors)
    return f"MLP of {linear} linear layers evaluated" if linear else "rows without an MLP"


def _details(config: dict[str, Any]) -> dict[str, Any]:
    named = ("preseqlen", "mid_dim", "lowdata", "init_shallow", "_my_arg_tune_mode")
    return {name: config[name] for name in named if isinstance(config.get(name), str | int)}
