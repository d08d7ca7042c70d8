"""Tensors of any origin as a native artifact for the resident model, with their origin in its manifest.

Pure functions on any thread; called by the importers, by the server when it bakes, and by `converter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from prefix_store.artifact import encode
from prefix_store.importers.recognition import Provenance
from prefix_store.spec import BaseModelRef, BaseSpec, PrefixManifest

LayerTensors: TypeAlias = tuple[list[Tensor], list[Tensor]]
"""Keys and values per layer, each `[P, H_kv, D]`."""


def native_artifact(
    base: BaseSpec,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    provenance: Provenance,
    *,
    token_start: int | None = None,
    base_is_known: bool = False,
) -> bytes:
    """The artifact of `keys[layer]`, `values[layer]`, each `[P, H_kv, D]`. The same input, the same bytes.

    `base_is_known`: the tensors were made for, or on, these very weights. `token_start` None means P.
    Raises `MalformedArtifact` when the tensors can not be one.
    """
    num_virtual_tokens = keys[0].shape[0]
    manifest = PrefixManifest(
        num_virtual_tokens=num_virtual_tokens,
        token_start=None if token_start == num_virtual_tokens else token_start,
        k_space="post_rope" if base.position_scheme == "rope" else "none",
        model_type=base.model_type,
        rope_theta=base.rope_theta,
        base_model=base.as_ref() if base_is_known else BaseModelRef(),
        source=provenance.as_source(),
    )
    return encode(manifest, keys, values)
