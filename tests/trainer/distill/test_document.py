"""A document in parts: nothing is lost, nothing is too long, and all of it is studied."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.distill.material import TEXT, words
from trainer.distill.document import Document, draw_chunks, read_document, text_of
from trainer.errors import BadData


def document_of(tmp_path: Path, text: str, shortest: int = 16) -> Document:
    path = tmp_path / "document.txt"
    path.write_text(text, encoding="utf-8")
    return read_document(path, words, shortest)


def numbered(count: int) -> str:
    return "\n".join(f"Line {n} has a few words. It has two sentences." for n in range(count))


def test_pieces_are_sentences_and_lines_and_together_the_text(tmp_path: Path) -> None:
    document = document_of(tmp_path, TEXT, shortest=64)

    assert "".join(document.pieces) == document.text == TEXT.strip()
    assert document.pieces[0] == "the quick brown fox jumps over the lazy dog. "
    assert document.pieces[1] == "many tasks are served by one model.\n"
    assert len(document.pieces) == 6
    assert document.num_tokens == words(TEXT)


def test_a_sentence_without_an_end_is_cut_between_words(tmp_path: Path) -> None:
    document = document_of(tmp_path, "word " * 300, shortest=16)

    assert "".join(document.pieces) == document.text
    assert max(document.lengths) <= 4
    assert {word for piece in document.pieces for word in piece.split()} == {"word"}


def test_a_text_without_any_white_space_is_cut_too(tmp_path: Path) -> None:
    path = tmp_path / "document.txt"
    path.write_text("字" * 200)

    document = read_document(path, len, 16)

    assert "".join(document.pieces) == "字" * 200
    assert max(document.lengths) <= 4


def test_chunks_of_a_long_document_have_the_lengths_asked_for_and_cover_it(tmp_path: Path) -> None:
    document = document_of(tmp_path, numbered(100))

    chunks = draw_chunks(document, 60, 40, 80, seed=3)

    lengths = [words(chunk.text) for chunk in chunks]
    assert max(lengths) <= 80
    assert min(lengths) > 40 - 5, "a chunk ends with a whole sentence"
    assert len(set(lengths)) > 5, "lengths are drawn"
    seen = {n for c in chunks for n in range(c.start, c.start + c.num_pieces)}
    assert seen == set(range(len(document.pieces)))
    assert all(chunk.text in document.text for chunk in chunks)


def test_a_document_that_fits_is_one_chunk_always(tmp_path: Path) -> None:
    document = document_of(tmp_path, TEXT)

    assert {c.text for c in draw_chunks(document, 9, 100, 200, seed=0)} == {document.text}


def test_chunks_are_a_function_of_the_seed(tmp_path: Path) -> None:
    document = document_of(tmp_path, numbered(40))

    assert draw_chunks(document, 9, 20, 30, seed=1) == draw_chunks(document, 9, 20, 30, seed=1)
    assert draw_chunks(document, 9, 20, 30, seed=1) != draw_chunks(document, 9, 20, 30, seed=2)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "the document is empty"),
        (b" \n\t\r\n", "the document is empty"),
        (b"\xff\xfe\x00", "expected UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_document_that_says_nothing_is_refused(
    tmp_path: Path, data: bytes | None, told: str
) -> None:
    path = tmp_path / "document.txt"
    if data is not None:
        path.write_bytes(data)

    with pytest.raises(BadData, match=told):
        read_document(path, words, 16)


def test_the_white_space_around_a_chunk_is_not_part_of_it() -> None:
    assert text_of([" one. ", "two.\n\n"]) == "one. two."
