"""Small bases and valid random artifacts for them; used by every test that needs a prefix."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefix_store.artifact import TORCH_DTYPES, encode
from prefix_store.header import FILE_DTYPES
from prefix_store.spec import BaseSpec, KVLayout, LayerLayout, PrefixManifest

TINY_BASE = BaseSpec(
    model_id="tiny",
    model_type="llama",
    layout=KVLayout((LayerLayout(2, 4, 4), LayerLayout(2, 4, 4)), "float32"),
    position_limit=128,
    position_scheme="rope",
    rope_theta=10000.0,
    vocab_size=100,
    fingerprint="sha256:" + "a" * 64,
)


def base_with(*, dtype: str | None = None, **changes: Any) -> BaseSpec:
    """`TINY_BASE` with some fields changed; `dtype` is the serving dtype."""
    if dtype is not None:
        changes["layout"] = replace(TINY_BASE.layout, dtype=dtype)
    return replace(TINY_BASE, **changes)


def manifest_for(base: BaseSpec, num_virtual_tokens: int, **changes: Any) -> PrefixManifest:
    """A manifest that `base` accepts, with some fields changed."""
    fields: dict[str, Any] = {
        "num_virtual_tokens": num_virtual_tokens,
        "k_space": "post_rope" if base.position_scheme == "rope" else "none",
        "model_type": base.model_type,
        "rope_theta": base.rope_theta,
        "base_model": {"fingerprint": base.fingerprint},
    }
    return PrefixManifest.model_validate(fields | changes)


def random_kv(
    base: BaseSpec, num_virtual_tokens: int, *, seed: int = 0, dtype: str = "float32"
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values per layer, `[P, H_kv, D]`."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads: int, dim: int) -> Tensor:
        values = torch.randn(num_virtual_tokens, heads, dim, generator=generator)
        return values.to(TORCH_DTYPES[dtype])

    layers = base.layout.layers
    keys = [tensor(layer.num_kv_heads, layer.key_dim) for layer in layers]
    values = [tensor(layer.num_kv_heads, layer.value_dim) for layer in layers]
    return keys, values


def make_artifact(
    base: BaseSpec = TINY_BASE,
    num_virtual_tokens: int = 3,
    *,
    seed: int = 0,
    dtype: str = "float32",
    **manifest_changes: Any,
) -> bytes:
    """A valid artifact for `base`; another `seed` gives other values."""
    keys, values = random_kv(base, num_virtual_tokens, seed=seed, dtype=dtype)
    return encode(manifest_for(base, num_virtual_tokens, **manifest_changes), keys, values)


def header_of(artifact: bytes) -> dict[str, Any]:
    """The header as plain JSON, for tests that change it."""
    length = int.from_bytes(artifact[:8], "little")
    header: dict[str, Any] = json.loads(artifact[8 : 8 + length])
    return header


def data_of(artifact: bytes) -> bytes:
    """The tensor bytes behind the header."""
    return artifact[8 + int.from_bytes(artifact[:8], "little") :]


def framed(header: bytes | str | dict[str, Any], data: bytes, *, pad: bool = True) -> bytes:
    """A file from a header that need not be right, and data."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    if pad:
        raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def raw_artifact(
    shapes: dict[str, list[int]], manifest: dict[str, Any], *, dtype: str = "F32"
) -> bytes:
    """A file whose framing is right whatever the shapes and the manifest say; all values are zero."""
    header: dict[str, Any] = {"__metadata__": {"prefixd": json.dumps(manifest)}}
    offset = 0
    width = torch.empty((), dtype=TORCH_DTYPES[FILE_DTYPES[dtype]]).element_size()
    for name, shape in shapes.items():
        end = offset + width * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return framed(header, bytes(offset))
