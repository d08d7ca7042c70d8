"""The header of an artifact: which tensors it must have, and the manifest beside them; and its writer.

`tensor_file` reads the layout; everything else that `docs/prefix-format.md` does not allow is refused here,
before a byte of tensor data is looked at. Knows nothing of torch. Pure functions on any thread; called by
`artifact` and, for uploads, by `store`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import JsonValue

from prefix_store.errors import MalformedArtifact, Problem
from prefix_store.manifest import parse_manifest
from prefix_store.spec import DTYPE_BYTES, MANIFEST_KEY, PrefixManifest
from prefix_store.tensor_file import (
    FILE_DTYPES,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    METADATA,
    TensorEntry,
    check_data,
    read_entry,
    read_fields,
)

__all__ = ["FILE_DTYPES", "LENGTH_BYTES", "MAX_HEADER_BYTES", "ArtifactHeader", "read_header"]

_TENSOR_NAME: Final = re.compile(r"dec_self\.[0-9]{3}\.[kv]")
_OTHER_BLOCK: Final = re.compile(r"(enc_self|dec_cross|soft)\.")

Shape = tuple[int, int, int]  # [P, H_kv, D]


@dataclass(frozen=True, slots=True)
class ArtifactHeader:
    """What the first bytes of an artifact say. Shapes are `[P, H_kv, D]`, one K and one V per layer.

    `data_start`: offset of the first tensor byte in the file. Tensors follow in the order
    layer 0 K, layer 0 V, layer 1 K, ... without a gap up to the end of the file.
    """

    manifest: PrefixManifest
    dtype: str
    key_shapes: tuple[Shape, ...]
    value_shapes: tuple[Shape, ...]
    data_start: int


def tensor_name(layer: int, part: str) -> str:
    """`dec_self.007.k`: the K (`part` "k") or V ("v") tensor of decoder self-attention layer 7."""
    return f"dec_self.{layer:03d}.{part}"


def tensor_names(num_layers: int) -> list[str]:
    """The names of an artifact's tensors in the order of their bytes."""
    return [tensor_name(layer, part) for layer in range(num_layers) for part in "kv"]


def write_header(manifest: PrefixManifest, dtype: str, shapes: Mapping[str, Shape]) -> bytes:
    """Length and header for tensors of these shapes, padded so that the data begins at 8 bytes."""
    file_dtype = next(name for name, ours in FILE_DTYPES.items() if ours == dtype)
    header: dict[str, Any] = {METADATA: {MANIFEST_KEY: manifest.model_dump_json()}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": file_dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_header(head: bytes | bytearray, total_bytes: int) -> ArtifactHeader:
    """The header of an artifact of `total_bytes`, of which `head` holds the first 64 KiB + 8 (or all).

    Raises `MalformedArtifact`, with every fault that could be found.
    """
    fields, metadata, data_start = read_fields(head, total_bytes)
    manifest = _manifest(metadata)
    num_layers = _check_names(list(fields))
    tensors = [read_entry(n, fields[n], "[P, H_kv, D]") for n in tensor_names(num_layers)]
    problems = [problem for tensor in tensors for problem in tensor.problems]
    problems = problems or check_data(tensors, total_bytes - data_start)
    if problems:
        raise MalformedArtifact(problems)
    return ArtifactHeader(
        manifest=manifest,
        dtype=FILE_DTYPES[tensors[0].dtype],
        key_shapes=tuple(_shape(tensor) for tensor in tensors[0::2]),
        value_shapes=tuple(_shape(tensor) for tensor in tensors[1::2]),
        data_start=data_start,
    )


def _shape(tensor: TensorEntry) -> Shape:
    return (tensor.shape[0], tensor.shape[1], tensor.shape[2])


def _manifest(metadata: JsonValue) -> PrefixManifest:
    pointer = f"/{METADATA}"
    if not isinstance(metadata, dict) or MANIFEST_KEY not in metadata:
        raise MalformedArtifact.at(
            pointer, f"no manifest: expected the metadata key {MANIFEST_KEY!r}"
        )
    # "format" is written by some savers of safetensors; it carries nothing.
    extra = sorted(metadata.keys() - {MANIFEST_KEY, "format"})
    if extra:
        raise MalformedArtifact.at(pointer, f"unexpected metadata key {extra[0][:64]!r}")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedArtifact.at(pointer, "metadata values must be strings")
    text = metadata[MANIFEST_KEY]
    assert isinstance(text, str)
    return parse_manifest(text)


def _check_names(names: list[str]) -> int:
    """The number of layers; raises unless the names are those of consecutive layers from 0."""
    if not names:
        raise MalformedArtifact.at("/tensors", "the artifact holds no tensors")
    problems = [_name_problem(name) for name in names if not _TENSOR_NAME.fullmatch(name)]
    if problems:
        raise MalformedArtifact(problems)
    num_layers = 1 + max(int(name.split(".")[1]) for name in names)
    present = set(names)
    missing = [name for name in tensor_names(num_layers) if name not in present]
    if missing:
        raise MalformedArtifact(
            [Problem(f"/tensors/{name}", f"tensor {name} is missing") for name in missing]
        )
    return num_layers


def _name_problem(name: str) -> Problem:
    shown = repr(name[:64])
    if _OTHER_BLOCK.match(name):
        detail = f"tensor {shown}: encoder-decoder prefixes are not served by this server"
    else:
        detail = f"unexpected tensor {shown}, expected names like 'dec_self.000.k'"
    return Problem(f"/tensors/{name[:64]}", detail)
