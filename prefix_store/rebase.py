"""Moving a prefix's keys to other positions by rotating them, exactly, where positions are a rotation.

A rotary embedding turns pairs of a key's elements by an angle that is linear in its position, and attention
sees differences of positions only. So keys that are turned on by `delta` positions, with requests that start
`delta` later, give the same logits. Learned positions are inside the key beyond recovery. The model's
frequencies come from `BaseSpec.rotary`, which the loader has proved against the model; types whose angles
depend on the length (dynamic, longrope) never get that far. Pure functions on any thread; called by
`importers.incoming` and `converter`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_store.artifact import Prefix, encode
from prefix_store.errors import Problem, RebaseRefused
from prefix_store.spec import BaseSpec, LayerRotary


def rotated(keys: Tensor, delta: int, rotary: LayerRotary) -> Tensor:
    """`keys` `[P, H, D]` turned on by `delta` positions; computed in float64, returned in their dtype.

    Elements behind the rotary part stay as they are, and so does a scale that yarn put on the keys.
    """
    angles = delta * torch.tensor(rotary.inverse_frequencies, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    num_pairs = len(rotary.inverse_frequencies)
    turned = keys.to(torch.float64, copy=True)
    if rotary.interleaved:
        first, second = slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2)
    else:
        first, second = slice(0, num_pairs), slice(num_pairs, 2 * num_pairs)
    a, b = turned[..., first].clone(), turned[..., second].clone()
    turned[..., first] = a * cos - b * sin
    turned[..., second] = b * cos + a * sin
    return turned.to(keys.dtype)


def rebased_keys(keys: tuple[Tensor, ...], delta: int, base: BaseSpec) -> tuple[Tensor, ...]:
    """All layers' keys turned on by `delta` positions. Raises `RebaseRefused`."""
    if base.position_scheme != "rope":
        raise _refusal(
            f"rebasing needs rotary positions, the base model's are {base.position_scheme!r}: "
            "upload the prefix with the token_start that it was trained with"
        )
    if base.rotary is None:
        raise _refusal(
            f"the rotation of {base.model_type}'s keys is not known exactly, so they can not be moved"
        )
    return tuple(
        rotated(layer_keys, delta, rotary)
        for layer_keys, rotary in zip(keys, base.rotary, strict=True)
    )


def rebased(prefix: Prefix, base: BaseSpec) -> bytes:
    """The artifact of `prefix` moved so that requests start at P, right behind it. Raises `RebaseRefused`."""
    manifest = prefix.manifest
    delta = manifest.num_virtual_tokens - manifest.first_position
    keys = rebased_keys(prefix.keys, delta, base)
    record = {"delta": delta, "from_digest": prefix.digest}
    moved = manifest.model_copy(
        update={"token_start": None, "source": {**manifest.source, "rebased": record}}
    )
    return encode(moved, keys, prefix.values)


def _refusal(detail: str) -> RebaseRefused:
    return RebaseRefused([Problem("/manifest/token_start", detail)])
