"""P-tuning v2 as THUDM wrote it, and ChatGLM's: `prefix_encoder.embedding`, tokens at position 0.

The embedding's rows are the prefix itself, or (`prefix_projection`) what an MLP `trans` makes it of.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from converter.checkpoints import tensors_of
from converter.converted import Converted, evaluate_mlp, split_slots, whole_number
from converter.errors import ConversionRefused
from converter.source import Source
from prefix_store.importers.geometry import row_geometry
from prefix_store.spec import BaseSpec

MARK = "prefix_encoder."


def read_ptuning_v2(source: Source, base: BaseSpec | None) -> Converted:
    """Raises `ConversionRefused`. Geometry is the base's, or that of ChatGLM's own config."""
    tensors = tensors_of(source.state, source.weights.name)
    part = {name.split(MARK, 1)[1]: t for name, t in tensors.items() if MARK in name}
    unknown = [
        name for name in part if name != "embedding.weight" and not name.startswith("trans.")
    ]
    if unknown:
        raise ConversionRefused(f"unexpected tensor {MARK}{unknown[0][:64]}")
    rows = part.get("embedding.weight")
    if rows is None or rows.dim() != 2:
        raise ConversionRefused(f"expected {MARK}embedding.weight [P, width]")
    if len(part) > 1:
        rows = evaluate_mlp(rows, part, "trans")
    layers, heads, dim = _geometry(source.config, base)
    if rows.shape[1] != 2 * layers * heads * dim:
        raise ConversionRefused(
            f"rows of {rows.shape[1]} elements; expected 2 x {layers} layers x {heads} kv heads x {dim}"
        )
    others = len(tensors) - len(part)
    return Converted(
        format="p-tuning-v2",
        recognised=f"P-tuning v2 prefix encoder: {_shape(rows)}"
        + (", MLP evaluated" if len(part) > 1 else ""),
        blocks={"dec_self": split_slots(rows, layers, heads, MARK)},
        token_start=0,
        model_type=source.config.get("model_type") if base is None else None,
        k_space="post_rope",
        assumed=("requests start at position 0, as P-tuning v2 has it",),
        warnings=(f"{others} tensors outside of the prefix encoder were left out",)
        if others
        else (),
    )


def _geometry(config: dict[str, Any], base: BaseSpec | None) -> tuple[int, int, int]:
    if base is not None:
        rows = row_geometry(base)
        return rows.num_layers, rows.num_heads, rows.head_dim
    heads = (
        whole_number(config, "multi_query_group_num")
        if config.get("multi_query_attention")
        else whole_number(config, "num_attention_heads")
    )
    return whole_number(config, "num_layers"), heads, whole_number(config, "kv_channels")


def _shape(rows: Tensor) -> str:
    return f"[{rows.shape[0]}, {rows.shape[1]}]"
