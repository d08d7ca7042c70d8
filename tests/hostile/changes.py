"""Small changes of one valid artifact: all that `malformed`, `bad_manifests` and `incompatible` are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from tests.hostile.disguised import VALID
from tests.prefix_store.builders import (
    TINY_BASE,
    data_of,
    framed,
    header_of,
    manifest_for,
    raw_artifact,
)

DATA: Final = data_of(VALID)
NAMES: Final = ("dec_self.000.k", "dec_self.000.v", "dec_self.001.k", "dec_self.001.v")
TENSOR_BYTES: Final = 3 * 2 * 4 * 4


def header_with(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The valid file with its header changed in place."""
    header = header_of(VALID)
    change(header)
    return framed(header, DATA)


def tensor_with(**fields: Any) -> bytes:
    """The valid file with fields of its third tensor changed."""
    return header_with(lambda header: header[NAMES[2]].update(fields))


def text_with(old: str, new: str) -> bytes:
    """The valid file with the text of its header changed once."""
    text = json.dumps(header_of(VALID))
    assert old in text
    return framed(text.replace(old, new, 1), DATA)


def manifest_with(**fields: Any) -> bytes:
    """The valid file with fields of its manifest changed."""
    header = header_of(VALID)
    manifest = json.loads(header["__metadata__"]["prefixd"]) | fields
    header["__metadata__"]["prefixd"] = json.dumps(manifest)
    return framed(header, DATA)


def manifest_without(field: str) -> bytes:
    header = header_of(VALID)
    manifest = json.loads(header["__metadata__"]["prefixd"])
    del manifest[field]
    header["__metadata__"]["prefixd"] = json.dumps(manifest)
    return framed(header, DATA)


def manifest_text(text: str) -> bytes:
    return header_with(lambda header: header["__metadata__"].update(prefixd=text))


def manifest_replacing(old: str, new: str) -> bytes:
    text = header_of(VALID)["__metadata__"]["prefixd"]
    assert old in text
    return manifest_text(text.replace(old, new, 1))


def metadata(value: Any) -> bytes:
    return header_with(lambda header: header.update(__metadata__=value))


def renamed(new: str, old: str = NAMES[3]) -> bytes:
    return header_with(lambda header: header.update({new: header.pop(old)}))


def without(*names: str) -> bytes:
    """Some tensors missing, the offsets of the others still as they were."""
    return header_with(lambda header: [header.pop(name) for name in names])


def with_length(length: int) -> bytes:
    return length.to_bytes(8, "little") + VALID[8:]


def reshaped(**changes: list[int]) -> bytes:
    """Right framing, other shapes; keys are k0, v0, k1, v1."""
    shapes = {name: changes.get(f"{name[-1]}{name[-3]}", [3, 2, 4]) for name in NAMES}
    return raw_artifact(shapes, manifest_for(TINY_BASE, 3).model_dump(mode="json"))


def offsets(*pairs: tuple[int, int]) -> bytes:
    """Offsets of all four tensors, in units of one tensor's bytes where whole."""
    header = header_of(VALID)
    for name, pair in zip(NAMES, pairs, strict=True):
        header[name]["data_offsets"] = list(pair)
    return framed(header, DATA)


T = TENSOR_BYTES
HEADER_TEXT: Final = json.dumps(header_of(VALID))
MANIFEST_TEXT: Final = header_of(VALID)["__metadata__"]["prefixd"]
FIRST: Final = json.dumps(header_of(VALID)[NAMES[0]])
