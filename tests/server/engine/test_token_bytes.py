"""The bytes behind tokens that are no whole character."""

from __future__ import annotations

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from server.engine.token_bytes import _ALPHABET, shown_bytes, token_bytes


def test_the_alphabet_is_that_of_byte_level_tokenizers() -> None:
    assert set(_ALPHABET) == set(ByteLevel.alphabet())
    assert sorted(_ALPHABET.values()) == list(range(256))


@pytest.mark.parametrize("char", ["語", "é", "👩"])
def test_each_byte_of_a_character_is_found(char: str) -> None:
    pieces = {byte: piece for piece, byte in _ALPHABET.items()}

    for byte in char.encode():
        assert token_bytes(pieces[byte], "\ufffd") == bytes([byte])
        assert token_bytes(f"<0x{byte:02X}>", "\ufffd") == bytes([byte])


@pytest.mark.parametrize("piece", ["", "\u2581fox", "\ufffd", "ab"])
def test_a_piece_that_does_not_make_the_text_has_no_bytes_to_tell(piece: str) -> None:
    assert token_bytes(piece, "\ufffd") is None


def test_bytes_are_shown_as_openai_shows_them() -> None:
    assert shown_bytes(b"\xe2\x80") == "bytes:\\xe2\\x80"
