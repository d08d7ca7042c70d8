"""Mutants: valid files after a few hostile edits of their frame, header, manifest or data.

`mutant(n, seed)` is the same for ever, on any machine, whichever others are made: a number is all that is
needed to have a failure again. Pure; called by `fuzz` and by the tests over HTTP.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tests.hostile.originals import Original

_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|[][{}:,]')
_MEMBER: Final = re.compile(r'"[^"\\]*": ?(?:"(?:[^"\\]|\\.)*"|\[[^][]*\]|\{[^{}]*\}|[0-9.]+)')
_NUMBERS: Final = (
    *("-1", "0", "1", "2", "3", "4", "-0", "1.0", "3e0", "1e999", "NaN", "-Infinity", "0x4", "04"),
    *(str(2**bits + step) for bits in (15, 31, 32, 53, 63, 64) for step in (-1, 0, 1)),
    *("9" * 400, "9" * 5000, "0." + "0" * 400 + "1", "true", "null", '"3"', "[]", "{}", "[3]"),
)
_STRINGS: Final = (
    *("", "F16", "BF16", "F32", "F64", "F8_E4M3", "F4", "I8", "U8", "BOOL", "C64", "f32", "F32 "),
    *("__metadata__", "prefixd", "format", "dtype", "shape", "data_offsets", "stride", "pt"),
    *("prompt_embeddings", "prefix_task_cols", "prefix_task_rows", "base_model.lm_head.weight"),
    *("dec_self.000.k", "dec_self.001.v", "dec_self.002.k", "dec_self.999.v", "soft.enc"),
    *(
        "../../etc/passwd",
        "a\\u0000",
        "\\ud800",
        "\\udc00\\ud800",
        "dec_self.000.\\u006b",
        "\u00e9",
    ),
    *("x" * 100, "x" * 50_000, "post_rope", "none", "llama", "gpt2", "sha256:" + "0" * 64),
)
_FRAGMENTS: Final = (
    '"a":1,',
    "[",
    "{}",
    '{"a":',
    '"",',
    " ",
    "1,",
    "\\u0000",
    '"dtype":"F32",',
    "-",
)
_LENGTHS: Final = (0, 1, 2, 7, 8, 64, 65535, 65536, 65537, 2**31, 2**32, 2**53, 2**63, 2**64 - 1)
_TAILS: Final = (
    b"\0",
    b" ",
    bytes(8),
    b"PK\x05\x06" + bytes(18),
    b"\x80\x04.",
    b"}" * 8,
    bytes(4096),
)
# 1e4, which is the limit, and the next value; NaNs, infinities, the largest, -0, the smallest normal and subnormals
_BITS_32: Final = (
    *(
        0x461C4000,
        0x461C4001,
        0xC61C4000,
        0xC61C4001,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0x7F800001,
    ),
    *(0x7F7FFFFF, 0xFF7FFFFF, 0x477FE000, 0x80000000, 0, 0x00800000, 0x00000001, 0x807FFFFF),
)
_BITS_16: Final = (
    *(0x70E2, 0x70E3, 0xF0E2, 0xF0E3, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0x7BFF, 0xFBFF, 0x8000, 0, 1),
    *(0x461C, 0x461D, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x7F7F, 0x0080, 0x0400, 0x83FF),
)


@dataclass(slots=True)
class Parts:
    """A file taken apart: `header` is its JSON without padding; `length` None means what it really is."""

    header: bytes
    data: bytearray
    length: int | None = None
    cut: int | None = None
    tail: bytes = b""

    def joined(self, padded: bool) -> bytes:
        """The file again."""
        text = self.header + b" " * (-len(self.header) % 8 if padded else 0)
        length = len(text) if self.length is None else self.length
        return (length.to_bytes(8, "little") + text + self.data)[: self.cut] + self.tail


@dataclass(frozen=True, slots=True)
class Mutant:
    """`data` is `original` changed; `number` and the seed make it again."""

    number: int
    original: Original
    data: bytes


Edit = Callable[[random.Random, Parts, Sequence[Original]], None]


def mutant(number: int, seed: int, originals: Sequence[Original]) -> Mutant:
    """Mutant `number` of a seed."""
    rng = random.Random(f"{seed}/{number}")
    original = originals[number % len(originals)]
    parts = Parts(
        original.data[8 : original.header_bytes].rstrip(b" "),
        bytearray(original.data[original.header_bytes :]),
    )
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choices(_EDITS, _WEIGHTS)[0](rng, parts, originals)
    return Mutant(number, original, parts.joined(padded=rng.random() < 0.95))


# ---- header and manifest -------------------------------------------------------------------------


def _edit_bytes(rng: random.Random, parts: Parts, _: Sequence[Original]) -> None:
    """One small change anywhere in the header, whatever it hits."""
    text = bytearray(parts.header) or bytearray(b"{")
    at = rng.randrange(len(text))
    match rng.randrange(6):
        case 0:
            text[at] ^= 1 << rng.randrange(8)
        case 1:
            text[at] = rng.choice(b'{}[]",: 019.-eE\\untrfk\0\xff')
        case 2:
            text[at] = rng.choice(b"0123456789")
        case 3:
            del text[at : at + rng.choice((1, 1, 8))]
        case 4:
            text[at:at] = rng.choice((b" ", b"0", b'"', b"{", b"[1]", b"        ", b"\xef\xbb\xbf"))
        case _:
            text[at:at] = text[at : at + rng.randrange(1, 40)]
    parts.header = bytes(text)


def _edit_header(rng: random.Random, parts: Parts, _: Sequence[Original]) -> None:
    text = parts.header.decode("utf-8", "surrogateescape")
    parts.header = _edited(rng, text).encode("utf-8", "surrogateescape")


def _edit_manifest(rng: random.Random, parts: Parts, _: Sequence[Original]) -> None:
    """The JSON text that is a string inside of the header's JSON."""
    try:
        header = json.loads(parts.header)
        text = header["__metadata__"]["prefixd"]
        header["__metadata__"]["prefixd"] = _edited(rng, text)
        parts.header = json.dumps(header, separators=(",", ":")).encode()
    except (ValueError, KeyError, TypeError, RecursionError):  # a PEFT file, or spoilt already
        _edit_header(rng, parts, _)


def _edited(rng: random.Random, text: str) -> str:
    """JSON with one token, or one member, replaced, removed, moved, repeated or stuffed."""
    tokens = list(_TOKEN.finditer(text))
    members = list(_MEMBER.finditer(text))
    if not tokens or not members:
        return text + rng.choice(_FRAGMENTS)
    one = rng.choice(tokens)
    before, after = text[: one.start()], text[one.end() :]
    match rng.randrange(8):
        case 0 | 1 | 2:
            return before + _hostile_token(rng, one[0]) + after
        case 3:
            return before + after
        case 4:
            member = rng.choice(members)
            return f"{text[: member.start()]}{member[0]},{text[member.start() :]}"
        case 5:
            other = rng.choice(tokens)
            return before + other[0] + after
        case 6:
            member, value = rng.choice(members), rng.choice(_NUMBERS)
            name = f'"{rng.choice(_STRINGS)}"'
            return f"{text[: member.start()]}{name}:{value},{text[member.start() :]}"
        case _:
            fragment = rng.choice(_FRAGMENTS)
            count = rng.choice((2, 30, 1000, 60_000 // len(fragment)))
            return text[: one.end()] + fragment * count + after


def _hostile_token(rng: random.Random, token: str) -> str:
    if token[0] == '"' and rng.random() < 0.8:
        return f'"{rng.choice(_STRINGS)}"'
    return rng.choice(_NUMBERS) if token[0] not in "[]{}:," else rng.choice("[]{}:,")


# ---- frame and data ------------------------------------------------------------------------------


def _edit_frame(rng: random.Random, parts: Parts, originals: Sequence[Original]) -> None:
    size = 8 + len(parts.header) + len(parts.data)
    match rng.randrange(5):
        case 0:
            parts.length = rng.choice(_LENGTHS)
        case 1:
            parts.length = max(len(parts.header) + rng.choice((-8, -1, 1, 8, len(parts.data))), 0)
        case 2:
            parts.cut = rng.randrange(size)
        case 3:
            parts.tail += rng.choice(_TAILS)
        case _:  # a part of another file
            other = rng.choice(originals)
            if rng.random() < 0.5:
                parts.header = other.data[8 : other.header_bytes].rstrip(b" ")
            else:
                parts.data = bytearray(other.data[rng.randrange(other.header_bytes) :])


def _edit_data(rng: random.Random, parts: Parts, _: Sequence[Original]) -> None:
    """Values: one, many, or raw bytes. The header stays as it is, so only they can be the fault."""
    if not parts.data:
        return
    width = 4 if b'"F32"' in parts.header else 2
    value = rng.choice(_BITS_32 if width == 4 else _BITS_16).to_bytes(width, "little")
    at = rng.randrange(0, len(parts.data) - width + 1, width) if len(parts.data) >= width else 0
    match rng.randrange(5):
        case 0 | 1 | 2:
            parts.data[at : at + width] = value
        case 3:
            parts.data[:] = (value * len(parts.data))[: len(parts.data)]
        case _:
            parts.data[rng.randrange(len(parts.data))] ^= 1 << rng.randrange(8)


_EDITS: Final[tuple[Edit, ...]] = (
    _edit_bytes,
    _edit_header,
    _edit_manifest,
    _edit_frame,
    _edit_data,
)
_WEIGHTS: Final = (25, 28, 15, 10, 22)
