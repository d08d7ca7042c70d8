"""The bytes of a token that is no whole character, out of the name that its tokenizer has for it.

Pure; called by `Tokenizer.token_text` on the event loop's side.
"""

from __future__ import annotations

import re
from typing import Final

_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback


def _byte_level_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes: the printable ones of Latin-1 as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_ALPHABET: Final = _byte_level_alphabet()


def token_bytes(piece: str, text: str) -> bytes | None:
    """The bytes that the tokenizer's `piece` stands for, if they make `text` where they make a text; else None."""
    found = _BYTE_PIECE.fullmatch(piece)
    if found is not None:
        return bytes([int(found[1], 16)])
    if not piece or any(char not in _ALPHABET for char in piece):
        return None
    raw = bytes(_ALPHABET[char] for char in piece)
    return raw if raw.decode("utf-8", "replace") == text else None


def shown_bytes(raw: bytes) -> str:
    """As OpenAI's answers name a token that is no text: `bytes:\\xe2\\x80`."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
