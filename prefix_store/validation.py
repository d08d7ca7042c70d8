"""Whether the resident model can serve a prefix: every rule one small function, all faults told at once.

A prefix that breaks a rule here would load without complaint and then answer nonsense, or poison the batch
that it runs in. Pure functions on any thread; `store` calls them before an upload becomes visible and again
when stored bytes are loaded, because the server may have been restarted with another base model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from prefix_store.artifact import TORCH_DTYPES, Prefix, decode_with
from prefix_store.errors import IncompatiblePrefix, Problem
from prefix_store.header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    ArtifactHeader,
    read_header,
    tensor_name,
)
from prefix_store.spec import BaseSpec, PrefixManifest

_WIDEST_ELEMENT_BYTES: Final = 4  # float32, the widest dtype that a file may have
_MAX_SUBNORMAL_SHARE: Final = (
    0.01  # training leaves hardly any; more is a broken file, or meant to be slow
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows: tokens of a prefix, and the magnitude of its values.

    `max_abs_value`: trained keys and values stay far below 1e4; beyond it attention scores overflow in
    half precision although each value alone is finite.
    """

    max_num_virtual_tokens: int = 4096
    max_abs_value: float = 1e4


def max_artifact_bytes(base: BaseSpec, max_num_virtual_tokens: int) -> int:
    """Bytes of the largest artifact that could be valid for `base`; anything longer is refused unread."""
    elements = sum(layer.elements_per_token for layer in base.layout.layers)
    data = max_num_virtual_tokens * elements * _WIDEST_ELEMENT_BYTES
    return LENGTH_BYTES + MAX_HEADER_BYTES + data


def accept(data: bytearray, digest: str, base: BaseSpec, limits: Limits) -> Prefix:
    """The prefix in `data`, in the dtype of the file, proved servable by `base`.

    `data` becomes the memory of the tensors. Raises `MalformedArtifact` or `IncompatiblePrefix`.
    """
    header = read_header(data, len(data))
    require_compatible(header, base, limits)
    prefix = decode_with(header, data, digest)
    # All values at once: one pass instead of one per tensor, which matters while requests wait for a load.
    values = torch.frombuffer(data, dtype=TORCH_DTYPES[header.dtype], offset=header.data_start)
    if _value_fault(values, base.layout.dtype, limits.max_abs_value):
        raise IncompatiblePrefix([*_value_problems(prefix, base, limits)])
    return prefix


def require_compatible(header: ArtifactHeader, base: BaseSpec, limits: Limits) -> None:
    """Raise `IncompatiblePrefix` with all that the header shows to be wrong for `base`."""
    problems = [problem for rule in _HEADER_RULES for problem in rule(header, base)]
    problems += _check_length(header.manifest, limits)
    if problems:
        raise IncompatiblePrefix(problems)


def warnings_for(manifest: PrefixManifest, base: BaseSpec) -> tuple[str, ...]:
    """What is allowed and yet worth telling whoever uploads."""
    found = []
    if manifest.base_model.fingerprint is None:
        found.append("unverified base: the artifact carries no fingerprint of its base model")
    num_tokens = manifest.num_virtual_tokens
    windows = [layer.window for layer in base.layout.layers if layer.window is not None]
    if windows and num_tokens > min(windows):
        found.append(
            f"the prefix has {num_tokens} tokens, more than the sliding window of {min(windows)}: "
            "layers with a window never see its first tokens"
        )
    return tuple(found)


def value_warnings(prefix: Prefix) -> tuple[str, ...]:
    """What its values, in the dtype of the file, are worth telling whoever uploads."""
    tensors = (*prefix.keys, *prefix.values)
    dtype = tensors[0].dtype
    smallest = torch.finfo(dtype).tiny
    count = sum(int(((x != 0) & (x.abs() < smallest)).sum()) for x in tensors)
    share = count / sum(x.numel() for x in tensors)
    if share <= _MAX_SUBNORMAL_SHARE:
        return ()
    name = str(dtype).removeprefix("torch.")
    return (
        f"{share:.0%} of the values are subnormal in {name}: a CPU can compute many times slower with them",
    )


def _check_layer_count(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    got, expected = len(header.key_shapes), base.layout.num_layers
    if got != expected:
        yield Problem("/tensors", f"the prefix has {got} layers, the base model has {expected}")


def _check_shapes(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    expected_tokens = header.manifest.num_virtual_tokens
    layers = zip(header.key_shapes, header.value_shapes, base.layout.layers, strict=False)
    for index, (key_shape, value_shape, layout) in enumerate(layers):
        for part, shape, dim in (
            ("key", key_shape, layout.key_dim),
            ("value", value_shape, layout.value_dim),
        ):
            pointer = f"/tensors/{tensor_name(index, part[0])}/shape"
            tokens, heads, got_dim = shape
            if tokens != expected_tokens:
                detail = f"has {tokens} tokens, the manifest says {expected_tokens}"
                yield Problem(pointer, f"layer {index} {part} {detail}")
            if heads != layout.num_kv_heads:
                detail = f"has {heads} heads, the base model has {layout.num_kv_heads}"
                yield Problem(pointer, f"layer {index} {part} {detail}")
            if got_dim != dim:
                detail = f"has a head dimension of {got_dim}, the base model has {dim}"
                yield Problem(pointer, f"layer {index} {part} {detail}")


def _check_grouped_heads(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    """Prefixes of PEFT before its GQA fix: one head per attention head. Told apart to say the remedy."""
    pairs = list(zip(header.key_shapes, base.layout.layers, strict=False))
    if all(
        heads > layout.num_kv_heads and heads % layout.num_kv_heads == 0 and dim == layout.key_dim
        for (_, heads, dim), layout in pairs
    ):
        yield Problem(
            "/tensors",
            "every layer has a multiple of the base model's key/value heads: the prefix holds one head "
            "per attention head, as PEFT wrote before it supported grouped-query attention; train or "
            "export it again with num_attention_heads = num_key_value_heads",
        )


def _check_model_type(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    got = header.manifest.model_type
    if got != base.model_type:
        detail = f"model_type is {got!r}, the base model is {base.model_type!r}"
        yield Problem("/manifest/model_type", detail)


def _check_k_space(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    expected = "post_rope" if base.position_scheme == "rope" else "none"
    got = header.manifest.k_space
    if got != expected:
        detail = f"k_space is {got!r}, a base model with {base.position_scheme!r} positions needs {expected!r}"
        yield Problem("/manifest/k_space", detail)


def _check_rope_theta(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    got = header.manifest.rope_theta
    if got is None or (base.rope_theta is not None and math.isclose(got, base.rope_theta)):
        return
    expected = "none" if base.rope_theta is None else f"{base.rope_theta:g}"
    detail = f"rope_theta is {got:g}, the base model has {expected}"
    yield Problem("/manifest/rope_theta", detail)


def _check_fingerprints(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    """The weights, the settings and the tokenizer each, so that the refusal names what differs."""
    ref = header.manifest.base_model
    for field, what, got, expected in (
        ("fingerprint", "weights", ref.fingerprint, base.fingerprint),
        ("config_fingerprint", "settings", ref.config_fingerprint, base.config_fingerprint),
        (
            "tokenizer_fingerprint",
            "tokenizer",
            ref.tokenizer_fingerprint,
            base.tokenizer_fingerprint,
        ),
    ):
        if got is not None and expected is not None and got != expected:
            detail = f"trained on a base whose {what} fingerprint is {got}, the base model's is {expected}"
            yield Problem(f"/manifest/base_model/{field}", detail)


def _check_vocab_size(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    got = header.manifest.base_model.vocab_size
    if got is not None and got != base.vocab_size:
        detail = f"vocab_size is {got}, the base model has {base.vocab_size}"
        yield Problem("/manifest/base_model/vocab_size", detail)


def _check_positions(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    first, limit = header.manifest.first_position, base.position_limit
    if limit is not None and first + 1 > limit:
        detail = f"requests would start at position {first}, the base model has {limit} positions"
        yield Problem("/manifest/token_start", detail)


def _check_probe(header: ArtifactHeader, base: BaseSpec) -> Iterator[Problem]:
    probe = header.manifest.probe
    if probe is None:
        return
    for field, ids in (("input_ids", probe.input_ids), ("top_ids", probe.top_ids)):
        if max(ids) >= base.vocab_size:
            detail = f"probe.{field} holds {max(ids)}, the base model has {base.vocab_size} tokens"
            yield Problem(f"/manifest/probe/{field}", detail)
    end, limit = header.manifest.first_position + len(probe.input_ids), base.position_limit
    if limit is not None and end > limit:
        detail = f"the probe ends at position {end}, the base model has {limit} positions"
        yield Problem("/manifest/probe/input_ids", detail)


def _check_length(manifest: PrefixManifest, limits: Limits) -> list[Problem]:
    got, allowed = manifest.num_virtual_tokens, limits.max_num_virtual_tokens
    if got <= allowed:
        return []
    detail = f"the prefix has {got} tokens, this server allows {allowed}"
    return [Problem("/manifest/num_virtual_tokens", detail)]


_HEADER_RULES: Final[tuple[Callable[[ArtifactHeader, BaseSpec], Iterable[Problem]], ...]] = (
    _check_layer_count,
    _check_shapes,
    _check_grouped_heads,
    _check_model_type,
    _check_k_space,
    _check_rope_theta,
    _check_fingerprints,
    _check_vocab_size,
    _check_positions,
    _check_probe,
)


def _value_problems(prefix: Prefix, base: BaseSpec, limits: Limits) -> Iterator[Problem]:
    for part, tensors in (("key", prefix.keys), ("value", prefix.values)):
        for layer, tensor in enumerate(tensors):
            fault = _value_fault(tensor, base.layout.dtype, limits.max_abs_value)
            if fault:
                pointer = f"/tensors/{tensor_name(layer, part[0])}"
                yield Problem(pointer, f"layer {layer} {part} {fault}")


def _value_fault(tensor: torch.Tensor, serving_dtype: str, max_abs_value: float) -> str | None:
    """Judged by the extremes alone: NaN shows in both, and a cast keeps order."""
    low, high = torch.aminmax(tensor)
    extremes = torch.stack((low, high))
    if not extremes.isfinite().all():
        return "holds NaN or infinity"
    if not extremes.to(TORCH_DTYPES[serving_dtype]).isfinite().all():
        return f"holds a value that overflows {serving_dtype}, the base model's dtype"
    if extremes.abs().max().item() > max_abs_value:
        return f"holds a value beyond the allowed magnitude of {max_abs_value:g}"
    return None
