"""Well-formed artifacts that `TINY_BASE` can not serve, each with a name that says why."""

from __future__ import annotations

from typing import Final

from prefix_store.artifact import encode
from prefix_store.spec import KVLayout, LayerLayout
from tests.hostile.changes import manifest_with, reshaped
from tests.prefix_store.builders import (
    TINY_BASE,
    base_with,
    make_artifact,
    manifest_for,
    random_kv,
)


def for_layers(*layers: tuple[int, int, int]) -> bytes:
    """A valid artifact for another geometry."""
    layout = KVLayout(tuple(LayerLayout(*layer) for layer in layers), "float32")
    return make_artifact(base_with(layout=layout))


def holding(value: float, layer: int = 1, dtype: str = "float32") -> bytes:
    keys, values = random_kv(TINY_BASE, 3, dtype=dtype)
    keys[layer][2, 1, 3] = value
    return encode(manifest_for(TINY_BASE, 3), keys, values)


INCOMPATIBLE: Final[dict[str, bytes]] = {
    "one layer too few": for_layers((2, 4, 4)),
    "one layer too many": for_layers((2, 4, 4), (2, 4, 4), (2, 4, 4)),
    "heads of attention instead of heads of keys": for_layers((8, 4, 4), (8, 4, 4)),
    "one layer with other heads": for_layers((2, 4, 4), (1, 4, 4)),
    "other key dimension": for_layers((2, 8, 4), (2, 8, 4)),
    "other value dimension": for_layers((2, 4, 8), (2, 4, 8)),
    "heads and dimension swapped": for_layers((4, 2, 2), (4, 2, 2)),
    "tensors of differing lengths": reshaped(v1=[4, 2, 4]),
    "heads before tokens": reshaped(k0=[2, 3, 4], v0=[2, 3, 4], k1=[2, 3, 4], v1=[2, 3, 4]),
    "length that the manifest denies": manifest_with(num_virtual_tokens=4),
    "other architecture": make_artifact(model_type="gpt2"),
    "keys without rotation": make_artifact(k_space="none"),
    "other rope_theta": make_artifact(rope_theta=1e6),
    "other fingerprint": make_artifact(base_model={"fingerprint": "sha256:" + "b" * 64}),
    "other vocabulary": make_artifact(base_model={"vocab_size": 99}),
    "start behind the last position": make_artifact(token_start=128),
    "more tokens than positions": make_artifact(num_virtual_tokens=128),
    "more tokens than allowed": make_artifact(num_virtual_tokens=33),
    "NaN": holding(float("nan")),
    "NaN in the first layer": holding(float("nan"), layer=0),
    "infinity": holding(float("inf")),
    "minus infinity in half precision": holding(float("-inf"), dtype="float16"),
    "NaN in bfloat16": holding(float("nan"), dtype="bfloat16"),
    "finite and destructive": holding(1e30),
    "largest float16": holding(-65504.0, dtype="float16"),
}
