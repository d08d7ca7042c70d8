"""The header of an artifact: our own strict reader of the safetensors layout, and its writer.

The safetensors library is memory-safe but lenient: it accepts duplicate tensor names, unknown fields,
empty tensors and headers of 100 MB. Everything that `docs/prefix-format.md` does not allow is refused here,
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
from prefix_store.manifest import parse_manifest, parse_object
from prefix_store.spec import DTYPE_BYTES, MANIFEST_KEY, PrefixManifest

MAX_HEADER_BYTES: Final = 64 * 1024
LENGTH_BYTES: Final = 8
FILE_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_METADATA: Final = "__metadata__"
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
    header: dict[str, Any] = {_METADATA: {MANIFEST_KEY: manifest.model_dump_json()}}
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
    text, data_start = _header_text(head, total_bytes)
    fields = parse_object(text, "header")
    manifest = _manifest(fields.pop(_METADATA, None))
    num_layers = _check_names(list(fields))
    tensors = [_tensor(name, fields[name]) for name in tensor_names(num_layers)]
    problems = [problem for tensor in tensors for problem in tensor.problems]
    problems = problems or _check_data(tensors, total_bytes - data_start)
    if problems:
        raise MalformedArtifact(problems)
    return ArtifactHeader(
        manifest=manifest,
        dtype=FILE_DTYPES[tensors[0].dtype],
        key_shapes=tuple(tensor.shape for tensor in tensors[0::2]),
        value_shapes=tuple(tensor.shape for tensor in tensors[1::2]),
        data_start=data_start,
    )


def _header_text(head: bytes | bytearray, total_bytes: int) -> tuple[str, int]:
    """The header's JSON without its padding, and where the data starts."""
    if len(head) < LENGTH_BYTES:
        raise MalformedArtifact.at("/header", f"the file has {total_bytes} bytes, fewer than 8")
    num_bytes = int.from_bytes(head[:LENGTH_BYTES], "little")
    if num_bytes > MAX_HEADER_BYTES:
        raise MalformedArtifact.at(
            "/header",
            f"the header claims {num_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed",
        )
    data_start = LENGTH_BYTES + num_bytes
    if data_start > total_bytes or data_start > len(head):
        raise MalformedArtifact.at(
            "/header", f"the header claims {num_bytes} bytes, the file has {total_bytes} in all"
        )
    if num_bytes % 8:
        raise MalformedArtifact.at(
            "/header", f"the header has {num_bytes} bytes, expected a multiple of 8"
        )
    try:
        text = bytes(head[LENGTH_BYTES:data_start]).decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedArtifact.at("/header", "the header is not UTF-8") from None
    stripped = text.rstrip(" ")
    if not stripped.startswith("{") or not stripped.endswith("}") or len(text) - len(stripped) > 7:
        raise MalformedArtifact.at(
            "/header", "the header is not one JSON object followed by at most 7 spaces"
        )
    return stripped, data_start


def _manifest(metadata: JsonValue) -> PrefixManifest:
    pointer = f"/{_METADATA}"
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


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One header entry; the other fields mean something only where `problems` is empty."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int
    problems: tuple[Problem, ...]


def _tensor(name: str, entry: JsonValue) -> _Tensor:
    pointer = f"/tensors/{name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        fault = Problem(pointer, f"{name}: expected exactly the fields dtype, shape, data_offsets")
        return _Tensor(name, "", (0, 0, 0), 0, 0, (fault,))
    dtype, shape, offsets = entry["dtype"], _ints(entry["shape"]), _ints(entry["data_offsets"])
    problems = []
    if not isinstance(dtype, str) or dtype not in FILE_DTYPES:
        allowed = ", ".join(FILE_DTYPES)
        problems.append(Problem(f"{pointer}/dtype", f"{name}: dtype must be one of {allowed}"))
    if len(shape) != 3 or min(shape) < 1:
        problems.append(
            Problem(
                f"{pointer}/shape", f"{name}: expected a shape [P, H_kv, D] of positive integers"
            )
        )
    if len(offsets) != 2:
        problems.append(
            Problem(f"{pointer}/data_offsets", f"{name}: expected two integers [begin, end]")
        )
    if problems:
        return _Tensor(name, "", (0, 0, 0), 0, 0, tuple(problems))
    return _Tensor(name, str(dtype), (shape[0], shape[1], shape[2]), offsets[0], offsets[1], ())


def _ints(value: JsonValue) -> list[int]:
    """`value` if it is a short list of non-negative integers, else an empty list."""
    if not isinstance(value, list) or len(value) > 3:
        return []
    # type() and not isinstance: True is no integer here.
    numbers = [item for item in value if type(item) is int and item >= 0]
    return numbers if len(numbers) == len(value) else []


def _check_data(tensors: list[_Tensor], data_bytes: int) -> list[Problem]:
    """One dtype, and tensors that cover the data exactly: no gap, no overlap, nothing behind them."""
    problems = []
    dtype = tensors[0].dtype
    end = 0
    for tensor in tensors:
        pointer = f"/tensors/{tensor.name}"
        if tensor.dtype != dtype:
            detail = f"{tensor.name} is {tensor.dtype}, the tensors before it are {dtype}"
            problems.append(Problem(f"{pointer}/dtype", detail))
        begin = end
        end = begin + math.prod(tensor.shape) * DTYPE_BYTES[FILE_DTYPES[tensor.dtype]]
        if (tensor.begin, tensor.end) != (begin, end):
            detail = f"{tensor.name}: expected data_offsets [{begin}, {end}], got [{tensor.begin}, {tensor.end}]"
            problems.append(Problem(f"{pointer}/data_offsets", detail))
    if end != data_bytes:
        detail = f"the tensors take {end} bytes, the file holds {data_bytes} behind the header"
        problems.append(Problem("/data", detail))
    return problems
