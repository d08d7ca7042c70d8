"""The document, and the parts of it that the teacher sees. Pure but for reading the file; called by `self_study`.

A chunk is a run of whole lines or sentences of a drawn length. Chunks overlap and lie spread over all of the document, so
each part of it is seen in several surroundings, and a document may be longer than the model's context.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trainer.errors import BadData

CountTokens = Callable[[str], int]

_PIECES: Final = re.compile(r".+?(?:\n+|(?<=[.!?])\s+|$)", re.DOTALL)
_PIECES_A_CHUNK: Final = 4  # at least, of the shortest one: a longer sentence is cut


@dataclass(frozen=True, slots=True)
class Document:
    """`digest`: `sha256:<hex>` of the file. `pieces` joined are `text`; `lengths`: tokens of each piece."""

    text: str
    digest: str
    pieces: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Of the pieces one by one: a little more than of the text as a whole."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the document. `start`: its first piece."""

    text: str
    start: int
    num_pieces: int


def read_document(path: Path, count_tokens: CountTokens, min_chunk_tokens: int) -> Document:
    """Raises `BadData` for a file that is not there, is not UTF-8 or says nothing."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise BadData(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadData(f"{path}: expected UTF-8; {error}") from None
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise BadData(f"{path}: the document is empty")
    longest = max(1, min_chunk_tokens // _PIECES_A_CHUNK)
    found = [part for piece in _PIECES.findall(text) for part in _cut(piece, longest, count_tokens)]
    lengths = tuple(count_tokens(piece) for piece in found)
    return Document(text, f"sha256:{hashlib.sha256(data).hexdigest()}", tuple(found), lengths)


def _cut(piece: str, longest: int, count_tokens: CountTokens) -> list[str]:
    """The piece in parts of at most `longest` tokens, at white space where there is some."""
    if len(piece) == 1 or count_tokens(piece) <= longest:
        return [piece]
    middle = len(piece) // 2
    space = piece.rfind(" ", 1, middle + 1)
    at = space if space > middle // 2 else middle
    return [*_cut(piece[:at], longest, count_tokens), *_cut(piece[at:], longest, count_tokens)]


def draw_chunks(document: Document, count: int, low: int, high: int, seed: int) -> list[Chunk]:
    """`count` chunks of `low` to `high` tokens, spread evenly over the document; the whole of a shorter one."""
    rng = random.Random(f"{seed}/chunks")  # noqa: S311 - a choice, no secret
    starts = list(itertools.accumulate(document.lengths, initial=0))
    total = starts.pop()
    places = [(index + rng.random()) * total / count for index in range(count)]
    rng.shuffle(places)
    chunks = []
    for place in places:
        length = rng.randint(low, high)
        first = min(max(place - length / 2, 0), max(total - length, 0))
        # The rounding down of the last chunk's beginning would leave the end of the document out.
        start = next(i for i, at in enumerate(starts) if at >= first) if first <= starts[-1] else -1
        chunks.append(_chunk(document, start % len(starts), length))
    return chunks


def _chunk(document: Document, start: int, length: int) -> Chunk:
    """As many pieces from `start` on as have at most `length` tokens; at least one."""
    stop, used = start, 0
    while stop < len(document.lengths) and (
        stop == start or used + document.lengths[stop] <= length
    ):
        used += document.lengths[stop]
        stop += 1
    return Chunk(text_of(document.pieces[start:stop]), start, stop - start)


def text_of(pieces: Sequence[str]) -> str:
    """Pieces as one text, without the white space around it."""
    return "".join(pieces).strip()
