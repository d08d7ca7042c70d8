"""Examples from files: JSONL or CSV to prompts and completions, and which of them are held out.

Runs on the main thread before training; called by `session` and by whoever evaluates on the same data. Knows
nothing of tokens. A file with a bad line is refused as a whole, with the numbers of its bad lines: training on what
happens to be readable would be another experiment.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trainer.errors import BadData

_MAX_SHOWN: Final = 10
_CSV_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_JSONL: Final = (".jsonl", ".ndjson")
_ROLES: Final = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """What is asked and what is answered. `prompt`: a text, or the conversation before the answer.

    `line` is where it stands in its file, from 1; the first one for a record of several lines.
    """

    prompt: str | tuple[Message, ...]
    completion: str
    line: int

    @property
    def identity(self) -> str:
        """Equal for equal prompts, whatever the completion."""
        if isinstance(self.prompt, str):
            return self.prompt
        return json.dumps([[turn.role, turn.content] for turn in self.prompt])


@dataclass(frozen=True, slots=True)
class Fields:
    """The names of the keys or columns that hold prompt and completion."""

    prompt: str = "prompt"
    completion: str = "completion"


class _BadLine(Exception):
    """Why one line is no example."""


def read_examples(path: Path, fields: Fields = Fields()) -> list[Example]:
    """The examples of a JSONL, CSV or TSV file (by its ending). Raises `BadData`.

    JSONL: an object a line, with `prompt` and `completion`, or with `messages` whose last is the answer. CSV: a
    header line, and columns of the names in `fields`.
    """
    ending = path.suffix.lower()
    if ending not in _JSONL and ending not in _CSV_DELIMITERS:
        known = ", ".join((*_JSONL, *_CSV_DELIMITERS))
        raise BadData(f"{path}: expected a file that ends in {known}")
    examples, faults = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _json_rows(file) if ending in _JSONL else _csv_rows(path, file, fields)
            for line, row in rows:
                try:
                    examples.append(_example(row, line, fields))
                except _BadLine as fault:
                    faults.append(f"line {line}: {fault}")
    except OSError as error:
        raise BadData(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadData(f"{path}: {_where_not_utf_8(path)}") from None
    if faults:
        raise BadData(_report(path, faults))
    if not examples:
        raise BadData(f"{path}: holds no example")
    return examples


def digest_of_file(path: Path) -> str:
    """`sha256:<hex>` of a data file: what a resumed run compares."""
    sha = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                sha.update(block)
    except OSError as error:
        raise BadData(f"{path}: {error.strerror}") from None
    return f"sha256:{sha.hexdigest()}"


def split(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, at least one of each. Raises `BadData` for fewer than two prompts.

    By the hash of the prompt: equal prompts stay together, and nearly all examples keep their side when others are added.
    A prompt that comes so often that it would take the share further from `fraction` is trained on.
    """
    counts = Counter(example.identity for example in examples)
    if len(counts) < 2:
        raise BadData(
            f"{len(examples)} examples with the same prompt: expected different ones, to hold some out"
        )

    def rank(prompt: str) -> str:
        return hashlib.sha256(f"{seed}/{prompt}".encode()).hexdigest()

    by_rank = sorted(counts, key=rank)
    wanted = max(1, round(fraction * len(examples)))
    chosen: set[str] = set()
    size = 0
    for prompt in by_rank:
        more = size + counts[prompt]
        if more < len(examples) and abs(more - wanted) < abs(wanted - size):
            chosen.add(prompt)
            size = more
    chosen = chosen or {min(by_rank, key=lambda prompt: counts[prompt])}
    held_out = [example for example in examples if example.identity in chosen]
    return [example for example in examples if example.identity not in chosen], held_out


def num_shared_prompts(training: Sequence[Example], held_out: Sequence[Example]) -> int:
    """Held-out examples whose very prompt is trained on."""
    seen = {example.identity for example in training}
    return sum(example.identity in seen for example in held_out)


def _json_rows(file: Any) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, line


def _csv_rows(path: Path, file: Any, fields: Fields) -> Iterator[tuple[int, Any]]:
    """Rows as dictionaries, with their first lines; what has no column stands under None."""
    reader = csv.DictReader(file, delimiter=_CSV_DELIMITERS[path.suffix.lower()], strict=True)
    line = 1
    try:
        _check_columns(path, reader.fieldnames or [], fields)
        line = reader.line_num + 1
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadData(f"{path}: line {line}: {error}") from None


def _check_columns(path: Path, columns: Sequence[str], fields: Fields) -> None:
    for name in (fields.prompt, fields.completion):
        count = columns.count(name)
        if count == 0:
            has = ", ".join(map(repr, columns)) or "nothing"
            raise BadData(f"{path}: no column {name!r}; its header line has {has}")
        if count > 1:
            raise BadData(f"{path}: {count} columns {name!r}; expected one, to know which is meant")


def _where_not_utf_8(path: Path) -> str:
    """The first line that is not UTF-8. The decoder's own place counts from the start of a buffer."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}: expected UTF-8, got byte 0x{line[error.start]:02x}"
    return "expected UTF-8"


def _example(row: Any, line: int, fields: Fields) -> Example:
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise _BadLine(f"not JSON: {error}") from None
        except RecursionError:
            raise _BadLine("not JSON: nested too deeply") from None
        if not isinstance(row, dict):
            raise _BadLine("expected a JSON object")
    elif any(beyond := row.get(None, ())):
        num_columns = len(row) - 1 + len(beyond)
        raise _BadLine(
            f"{num_columns} columns, but the header line has {len(row) - 1}: a text with the delimiter needs quotes"
        )
    if "messages" in row and fields.prompt not in row:
        *turns, answer = _messages(row["messages"])
        return Example(tuple(turns), answer.content, line)
    texts = []
    for name in (fields.prompt, fields.completion):
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            came = "nothing" if text is None else "an empty text" if text == "" else repr(text)[:60]
            raise _BadLine(f"{name}: expected a text that is not empty, got {came}")
        texts.append(_encodable(name, text))
    return Example(texts[0], texts[1], line)


def _encodable(what: str, text: str) -> str:
    """`text`, unless JSON's escapes made it one that is in no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise _BadLine(f"{what}: expected text, got half of a surrogate pair ({half})") from None
    return text


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or len(value) < 2:
        raise _BadLine("messages: expected a list of at least a question and an answer")
    turns = []
    for place, turn in enumerate(value, start=1):
        role, content = (
            (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else ("", "")
        )
        if role not in _ROLES or not isinstance(content, str):
            raise _BadLine(
                f"message {place}: expected a role ({', '.join(_ROLES)}) and a text as content"
            )
        turns.append(Message(role, _encodable(f"message {place}", content)))
    if turns[-1].role != "assistant" or not turns[-1].content.strip():
        raise _BadLine("messages: the last must be the assistant's, and not empty")
    return turns


def _report(path: Path, faults: list[str]) -> str:
    shown = "\n".join(faults[:_MAX_SHOWN])
    more = len(faults) - _MAX_SHOWN
    return f"{path}: {len(faults)} bad line{'s' * (len(faults) > 1)}\n{shown}" + (
        f"\nand {more} more" if more > 0 else ""
    )
