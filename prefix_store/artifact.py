"""The artifact: a prefix as one safetensors file, in memory and on disk (`docs/prefix-format.md`).

Tensors are read from memory that we own: a file that is mapped can change or shrink under its reader, and
then kills the process. Pure functions on any thread; called by `store`, by trainers and by converters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor

from prefix_store.errors import MalformedArtifact, Problem
from prefix_store.header import ArtifactHeader, Shape, read_header, tensor_names, write_header
from prefix_store.spec import DTYPE_BYTES, PrefixManifest, digest_of

__all__ = [
    "TORCH_DTYPES",
    "Prefix",
    "as_it_is",
    "decode",
    "digest_of",
    "encode",
    "read_header",
    "save",
]

T = TypeVar("T")

TORCH_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A prefix in host memory. Never written to: its tensors are shared by every thread that holds it.

    `keys[layer]` is `[P, H_kv, D_k]` with the rotary embedding applied, `values[layer]` is `[P, H_kv, D_v]`.
    """

    digest: str
    manifest: PrefixManifest
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def to(self, dtype: str) -> Prefix:
        """This prefix as it is served: in `dtype` ("bfloat16", ...), and without values too small to matter.

        Tensors that are so already are shared.
        """
        target = TORCH_DTYPES[dtype]
        return Prefix(
            self.digest,
            self.manifest,
            tuple(_without_subnormals(key.to(target)) for key in self.keys),
            tuple(_without_subnormals(value.to(target)) for value in self.values),
        )


def as_it_is(prefix: Prefix) -> Prefix:
    """The prefix itself: for whoever may be told in which form to keep one, or how to bring it nearer to its device."""
    return prefix


def encode(manifest: PrefixManifest, keys: Sequence[Tensor], values: Sequence[Tensor]) -> bytes:
    """The bytes of an artifact: `keys[layer]` and `values[layer]` are `[P, H_kv, D]`, all of one dtype.

    The same content gives the same bytes, hence the same digest. Raises `MalformedArtifact` when the
    result would not be accepted as an artifact.
    """
    _check_encodable(manifest, keys, values)
    names = tensor_names(len(keys))
    tensors = dict(zip(names, _interleave(keys, values), strict=True))
    dtype = next(name for name, ours in TORCH_DTYPES.items() if ours == keys[0].dtype)
    header = write_header(manifest, dtype, {name: _shape(t) for name, t in tensors.items()})
    data = header + b"".join(_raw_bytes(tensor) for tensor in tensors.values())
    read_header(data, len(data))  # what we write, we must accept
    return data


def save(path: Path, tensors: Mapping[str, Tensor], manifest: PrefixManifest) -> None:
    """Write an artifact from tensors by name (`dec_self.000.k`, ...).

    Raises `MalformedArtifact` as `encode` does, and for names that are missing or unknown.
    """
    names = tensor_names((len(tensors) + 1) // 2)
    if set(names) != tensors.keys():
        wrong = sorted(set(names) ^ tensors.keys())
        raise MalformedArtifact(
            [Problem(f"/tensors/{n}", f"missing or unknown: {n}") for n in wrong]
        )
    ordered = [tensors[name] for name in names]
    path.write_bytes(encode(manifest, ordered[0::2], ordered[1::2]))


def decode(data: bytes | bytearray, digest: str) -> Prefix:
    """The prefix in `data`, whose digest the caller has checked. Raises `MalformedArtifact`.

    A bytearray becomes the memory of the tensors and must not be written to afterwards; bytes are copied.
    """
    owned = data if isinstance(data, bytearray) else bytearray(data)
    return decode_with(read_header(data, len(data)), owned, digest)


def decode_with(header: ArtifactHeader, data: bytearray, digest: str) -> Prefix:
    """The prefix in `data`, of which `header` was read; a header may be 64 KiB of JSON."""
    tensors = _tensors(header, data)
    return Prefix(digest, header.manifest, tuple(tensors[0::2]), tuple(tensors[1::2]))


def _without_subnormals(tensor: Tensor) -> Tensor:
    """Magnitudes below 1.2e-38 as zero: a CPU computes with them many times slower, for every row of a batch.

    float16 stays as it is: its subnormals begin at 6e-5 and are computed as normal float32 numbers.
    """
    if tensor.dtype == torch.float16:
        return tensor
    tiny = (tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).smallest_normal)
    return tensor.masked_fill(tiny, 0.0) if bool(tiny.any()) else tensor


def _tensors(header: ArtifactHeader, data: bytearray) -> list[Tensor]:
    """Layer 0 K, layer 0 V, layer 1 K, ... as views of `data`; the header vouches for the bounds."""
    dtype = TORCH_DTYPES[header.dtype]
    offset = header.data_start
    tensors = []
    for shape in _interleave(header.key_shapes, header.value_shapes):
        count = shape[0] * shape[1] * shape[2]
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=offset)
        tensors.append(flat.view(shape))
        offset += count * DTYPE_BYTES[header.dtype]
    return tensors


def _check_encodable(
    manifest: PrefixManifest, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """What the header could not tell any more: list lengths, ranks, P, one known dtype."""
    if not keys or len(keys) != len(values):
        detail = f"expected as many keys as values, got {len(keys)} and {len(values)}"
        raise MalformedArtifact.at("/tensors", detail)
    problems = []
    for name, tensor in zip(tensor_names(len(keys)), _interleave(keys, values), strict=True):
        if tensor.dim() != 3 or tensor.shape[0] != manifest.num_virtual_tokens:
            expected = f"[{manifest.num_virtual_tokens}, H_kv, D]"
            detail = f"{name}: expected the shape {expected}, got {list(tensor.shape)}"
            problems.append(Problem(f"/tensors/{name}/shape", detail))
        if tensor.dtype != keys[0].dtype or tensor.dtype not in TORCH_DTYPES.values():
            detail = f"{name}: expected one dtype of {', '.join(TORCH_DTYPES)}, got {tensor.dtype}"
            problems.append(Problem(f"/tensors/{name}/dtype", detail))
    if problems:
        raise MalformedArtifact(problems)


def _interleave(keys: Sequence[T], values: Sequence[T]) -> list[T]:
    return [item for pair in zip(keys, values, strict=True) for item in pair]


def _shape(tensor: Tensor) -> Shape:
    return (tensor.shape[0], tensor.shape[1], tensor.shape[2])


def _raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
