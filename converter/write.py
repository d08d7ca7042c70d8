"""A converted prefix as the bytes of an artifact, proved against its base where one was given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from converter.base import Base
from converter.converted import Converted
from converter.errors import ConversionRefused
from converter.formats.peft_directory import ANY_LENGTH
from prefix_store.artifact import TORCH_DTYPES, encode
from prefix_store.header import write_header
from prefix_store.importers.native import LayerTensors, native_artifact
from prefix_store.importers.recognition import UNKNOWN_BASE, Provenance, Recognition
from prefix_store.rebase import rebased
from prefix_store.spec import BaseModelRef, PrefixManifest, digest_of
from prefix_store.tensor_file import read_tensor_file
from prefix_store.validation import accept
from server.model.attention import make_attention_backend
from server.model.baker import Baker


@dataclass(frozen=True)
class WriteOptions:
    """`dtype`: of the file, None as it comes. `rebase`: move the keys so that requests start at P."""

    dtype: str | None = None
    rebase: bool = False


@dataclass(frozen=True)
class Artifact:
    """The bytes, and what to tell about them."""

    data: bytes
    recognition: Recognition
    warnings: tuple[str, ...]


def write(converted: Converted, base: Base | None, sha256: str, options: WriteOptions) -> Artifact:
    """Raises `ConversionRefused`, or `PrefixRejected` when the prefix is not one for its base."""
    blocks = (
        dict(converted.blocks) if converted.soft is None else {"dec_self": _bake(converted, base)}
    )
    if options.dtype is not None:
        blocks = {name: _cast(tensors, options.dtype) for name, tensors in blocks.items()}
    _check_finite(blocks)
    recognition = _recognition(converted, base)
    provenance = Provenance(converted.format, recognition, sha256, dict(converted.details))
    if base is not None and base.spec is not None and blocks.keys() == {"dec_self"}:
        data = _for_base(blocks["dec_self"], base, provenance, converted.token_start, options)
    elif options.rebase:
        raise ConversionRefused("--rebase needs --base with the weights of a decoder-only model")
    else:
        data = _without_base(blocks, converted, base, provenance)
    return Artifact(data, recognition, converted.warnings)


def _for_base(
    tensors: LayerTensors,
    base: Base,
    provenance: Provenance,
    token_start: int | None,
    options: WriteOptions,
) -> bytes:
    """The artifact, accepted as the server that serves this base would."""
    assert base.spec is not None, "checked by the caller"
    data = native_artifact(
        base.spec,
        *tensors,
        provenance,
        token_start=token_start,
        base_is_known=base.model is not None,
    )
    prefix = accept(bytearray(data), digest_of(data), base.spec, ANY_LENGTH)
    return rebased(prefix, base.spec) if options.rebase else data


def _without_base(
    blocks: dict[str, LayerTensors],
    converted: Converted,
    base: Base | None,
    provenance: Provenance,
) -> bytes:
    """An artifact whose geometry only its source vouches for: GPT-2 directories, encoder-decoders."""
    model_type = converted.model_type or (base.config.model_type if base else None)
    if model_type is None:
        raise ConversionRefused(
            f"{converted.format} does not say which model it is for: give its directory with --base"
        )
    num_virtual_tokens = next(iter(blocks.values()))[0][0].shape[0]
    start = converted.token_start
    manifest = PrefixManifest(
        num_virtual_tokens=num_virtual_tokens,
        token_start=None if start == num_virtual_tokens else start,
        k_space=converted.k_space,
        model_type=model_type,
        base_model=BaseModelRef(vocab_size=converted.vocab_size),
        source=provenance.as_source(),
    )
    if blocks.keys() == {"dec_self"} and (base is None or base.spec is not None):
        return encode(manifest, *blocks["dec_self"])
    return _encode_blocks(manifest, blocks)


def _encode_blocks(manifest: PrefixManifest, blocks: dict[str, LayerTensors]) -> bytes:
    """Several kinds of attention in one file, in the order of their names."""
    tensors = {
        f"{block}.{layer:03d}.{part}": tensor
        for block, (keys, values) in sorted(blocks.items())
        for layer, pair in enumerate(zip(keys, values, strict=True))
        for part, tensor in zip("kv", pair, strict=True)
    }
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise ConversionRefused("the source mixes dtypes: choose one with --dtype")
    dtype = next(name for name, ours in TORCH_DTYPES.items() if ours in dtypes)
    shapes = {name: (t.shape[0], t.shape[1], t.shape[2]) for name, t in tensors.items()}
    raw = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors.values()]
    data = write_header(manifest, dtype, shapes) + b"".join(raw)
    read_tensor_file(data, len(data))
    return data


def _bake(converted: Converted, base: Base | None) -> LayerTensors:
    soft = converted.soft
    assert soft is not None, "checked by the caller"
    if base is None or base.model is None:
        raise ConversionRefused(
            "a soft prompt becomes keys and values by a run of its model: give a --base that holds the weights"
        )
    limit = base.model.position_limit
    if limit is not None and soft.num_virtual_tokens >= limit:
        raise ConversionRefused(f"{soft.num_virtual_tokens} tokens, the base has {limit} positions")
    bake = Baker(base.model, make_attention_backend("auto", base.model.device)).start(soft)
    while not bake.step():
        pass
    return bake.result()


def _cast(tensors: LayerTensors, dtype: str) -> LayerTensors:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(TORCH_DTYPES[dtype])

    return [cast(t) for t in tensors[0]], [cast(t) for t in tensors[1]]


def _check_finite(blocks: dict[str, LayerTensors]) -> None:
    for block, (keys, values) in blocks.items():
        for part, tensors in (("keys", keys), ("values", values)):
            for layer, tensor in enumerate(tensors):
                if tensor.dtype not in TORCH_DTYPES.values():
                    raise ConversionRefused(
                        f"{block} layer {layer} {part}: {tensor.dtype}, expected {', '.join(TORCH_DTYPES)}"
                    )
                if not tensor.isfinite().all():
                    raise ConversionRefused(f"{block} layer {layer} {part}: NaN or infinity")


def _recognition(converted: Converted, base: Base | None) -> Recognition:
    if base is not None and base.model is not None:
        told = ("trained on the very weights that --base names",)
        return Recognition(converted.recognised, (*converted.assumed, *told), ())
    return Recognition(converted.recognised, converted.assumed, (UNKNOWN_BASE,))
