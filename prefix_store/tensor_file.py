"""Our own strict reader of the safetensors layout: framing, JSON, entries, and data without a gap.

The safetensors library is memory-safe but lenient: it accepts duplicate tensor names, unknown fields,
empty tensors and headers of 100 MB. All that is refused here, before a byte of tensor data is looked at.
What the names and shapes must be is for `header` (artifacts) and `importers` (foreign files) to say. Knows
nothing of torch. Pure functions on any thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import JsonValue

from prefix_store.errors import MalformedArtifact, Problem
from prefix_store.manifest import parse_object
from prefix_store.spec import DTYPE_BYTES

MAX_HEADER_BYTES: Final = 64 * 1024
LENGTH_BYTES: Final = 8
FILE_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
METADATA: Final = "__metadata__"
MAX_RANK: Final = 5


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One header entry; the other fields mean something only where `problems` is empty.

    `dtype` is the file's word ("F32"). `begin`, `end` count from the first byte behind the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The header of a file of one dtype whose tensors are in no order that we know; by their offsets."""

    metadata: dict[str, JsonValue]
    tensors: dict[str, TensorEntry]
    dtype: str
    data_start: int


def read_fields(
    head: bytes | bytearray, total_bytes: int
) -> tuple[dict[str, JsonValue], JsonValue, int]:
    """The header's tensor entries, its metadata, and where the data starts. Raises `MalformedArtifact`.

    The file has `total_bytes`, of which `head` holds the first 64 KiB + 8, or all.
    """
    text, data_start = _header_text(head, total_bytes)
    fields = parse_object(text, "header")
    return fields, fields.pop(METADATA, None), data_start


def read_tensor_file(head: bytes | bytearray, total_bytes: int) -> TensorFile:
    """The header of any file that follows our rules of the layout. Raises `MalformedArtifact`."""
    fields, metadata, data_start = read_fields(head, total_bytes)
    entries = [read_entry(name, fields[name]) for name in fields]
    problems = [problem for entry in entries for problem in entry.problems]
    if not entries:
        problems = [Problem("/tensors", "the file holds no tensors")]
    entries.sort(key=lambda entry: entry.begin)
    problems = problems or check_data(entries, total_bytes - data_start)
    if problems:
        raise MalformedArtifact(problems)
    dtype = FILE_DTYPES[entries[0].dtype]
    return TensorFile(_strings(metadata), {e.name: e for e in entries}, dtype, data_start)


def read_entry(name: str, entry: JsonValue, form: str | None = None) -> TensorEntry:
    """One entry with its faults. `form`: the axes that it must have ("[P, H_kv, D]"), or None for any."""
    pointer = f"/tensors/{name[:64]}"
    shown = name[:64]
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        detail = f"{shown}: expected exactly the fields dtype, shape, data_offsets"
        return TensorEntry(name, "", (), 0, 0, (Problem(pointer, detail),))
    dtype, shape, offsets = entry["dtype"], _ints(entry["shape"]), _ints(entry["data_offsets"])
    problems = []
    if not isinstance(dtype, str) or dtype not in FILE_DTYPES:
        allowed = ", ".join(FILE_DTYPES)
        problems.append(Problem(f"{pointer}/dtype", f"{shown}: dtype must be one of {allowed}"))
    if not shape or min(shape) < 1 or (form is not None and len(shape) != form.count(",") + 1):
        expected = f"a shape {form}" if form else f"a shape of 1 to {MAX_RANK} axes"
        detail = f"{shown}: expected {expected} of positive integers"
        problems.append(Problem(f"{pointer}/shape", detail))
    if len(offsets) != 2:
        detail = f"{shown}: expected two integers [begin, end]"
        problems.append(Problem(f"{pointer}/data_offsets", detail))
    if problems:
        return TensorEntry(name, "", (), 0, 0, tuple(problems))
    return TensorEntry(name, str(dtype), tuple(shape), offsets[0], offsets[1])


def check_data(tensors: Sequence[TensorEntry], data_bytes: int) -> list[Problem]:
    """One dtype, and tensors that cover the data exactly, in this order: no gap, no overlap, no rest."""
    problems = []
    dtype = tensors[0].dtype
    end = 0
    for tensor in tensors:
        pointer = f"/tensors/{tensor.name[:64]}"
        shown = tensor.name[:64]
        if tensor.dtype != dtype:
            detail = f"{shown} is {tensor.dtype}, the tensors before it are {dtype}"
            problems.append(Problem(f"{pointer}/dtype", detail))
        begin = end
        end = begin + math.prod(tensor.shape) * DTYPE_BYTES[FILE_DTYPES[tensor.dtype]]
        if (tensor.begin, tensor.end) != (begin, end):
            detail = f"{shown}: expected data_offsets [{begin}, {end}], got [{tensor.begin}, {tensor.end}]"
            problems.append(Problem(f"{pointer}/data_offsets", detail))
    if end != data_bytes:
        detail = f"the tensors take {end} bytes, the file holds {data_bytes} behind the header"
        problems.append(Problem("/data", detail))
    return problems


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


def _strings(metadata: JsonValue) -> dict[str, JsonValue]:
    """The metadata of a foreign file; none is the same as empty."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedArtifact.at(f"/{METADATA}", "metadata must be an object of strings")
    return metadata


def _ints(value: JsonValue) -> list[int]:
    """`value` if it is a short list of non-negative integers, else an empty list."""
    if not isinstance(value, list) or len(value) > MAX_RANK:
        return []
    # type() and not isinstance: True is no integer here.
    numbers = [item for item in value if type(item) is int and item >= 0]
    return numbers if len(numbers) == len(value) else []
