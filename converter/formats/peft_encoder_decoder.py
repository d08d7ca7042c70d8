"""PEFT prefix tuning of an encoder-decoder, with the rows that PEFT really reads.

PEFT doubles the 2L rows to 4L and splits them by four, so decoder layer i takes K from row 4i mod 2L and V
from the row behind it: with an even L, layers i and i + L/2 share a prefix and half of the file is never
read. It applies to decoder self-attention alone; the cross-attention half is thrown away. Reproduced here,
because that is the function the adapter was trained as.
"""

from __future__ import annotations

from typing import Any

from converter.checkpoints import tensors_of
from converter.converted import Converted, whole_number
from converter.errors import ConversionRefused
from converter.source import Source


def is_encoder_decoder(config: dict[str, Any]) -> bool:
    """Whether PEFT's configuration is for an encoder-decoder."""
    return (
        config.get("num_transformer_submodules") == 2 or config.get("task_type") == "SEQ_2_SEQ_LM"
    )


def row_of(layer: int, num_layers: int) -> int:
    """The row of `[P, 2L, H, D]` that decoder layer `layer` takes its keys from."""
    return 4 * layer % (2 * num_layers)


def read_peft_encoder_decoder(source: Source, base_config: Any) -> Converted:
    """Raises `ConversionRefused` for soft prompts, which depend on the encoder's input."""
    config = source.config
    peft_type = config.get("peft_type")
    if peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ConversionRefused(
            f"{peft_type} of an encoder-decoder: its encoder is bidirectional, so what the prompt becomes "
            "depends on the input and can not be stored as keys and values"
        )
    tensors = tensors_of(source.state, source.weights.name)
    if tensors.keys() != {"prompt_embeddings"}:
        raise ConversionRefused(
            f"expected the tensor prompt_embeddings alone, got {', '.join(sorted(tensors))}"
        )
    rows = tensors["prompt_embeddings"]
    num_layers = whole_number(config, "num_layers")
    heads = whole_number(config, "num_attention_heads")
    dim = whole_number(config, "token_dim") // heads
    if rows.dim() != 2 or rows.shape[1] != 2 * num_layers * heads * dim:
        raise ConversionRefused(
            f"prompt_embeddings {list(rows.shape)}: expected rows of 2 x {num_layers} layers x {heads} heads x {dim}"
        )
    decoder_layers = _decoder_layers(base_config, num_layers)
    slots = rows.view(rows.shape[0], 2 * num_layers, heads, dim)
    used = [row_of(layer, num_layers) for layer in range(decoder_layers)]
    shared = len(set(used)) < len(used)
    warnings = [
        "PEFT gives the prefix to decoder self-attention only; encoder and cross-attention have none"
    ]
    if shared:
        warnings.append(
            "decoder layers share rows of the file (PEFT's layout), half of it is not read"
        )
    return Converted(
        format="peft",
        recognised=f"PEFT {peft_type} of an encoder-decoder: {list(rows.shape)}, decoder rows {used}",
        blocks={
            "dec_self": (
                [slots[:, row].contiguous() for row in used],
                [slots[:, row + 1].contiguous() for row in used],
            )
        },
        assumed=(f"decoder tokens start at position {rows.shape[0]}, as PEFT has it",),
        warnings=tuple(warnings),
        details={"peft_type": peft_type, "rows": list(used)},
    )


def _decoder_layers(base_config: Any, num_layers: int) -> int:
    """How many the base has; PEFT itself fails beyond the encoder's count."""
    for name in ("decoder_layers", "num_decoder_layers", "num_hidden_layers"):
        count = getattr(base_config, name, None)
        if isinstance(count, int):
            if count > num_layers:
                raise ConversionRefused(
                    f"the base has {count} decoder layers, the adapter {num_layers}: PEFT can not use it either"
                )
            return count
    return num_layers
