"""What a comparison found: frozen, as JSON, as a table for a terminal and for the report. Made by `comparison`; pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from reports.html_page import ResultTable
from trainer.standard_error import Score

COMPARISON: Final = "comparison.json"
PREFIX: Final = "prefix"
DOCUMENT: Final = "document"
CHUNK: Final = "chunk"
NO_DOCUMENT: Final = "no_document"

_SHOWN: Final = {
    PREFIX: "prefix",
    DOCUMENT: "document",
    CHUNK: "its part",
    NO_DOCUMENT: "neither",
}


@dataclass(frozen=True, slots=True)
class Condition:
    """The same held-out conversations under one condition, beside the teacher.

    `divergence`: nats an answer's token. `same_token`: percent of places where the most probable token is the teacher's,
    teacher-forced. `same_answer`, `token_f1`: of greedy answers, with the teacher's as references. `num_kv_tokens`,
    `kv_bytes`: what stands before the prompt, in the serving dtype; once for all requests if `kv_shared`, else for each.
    """

    divergence: float
    same_token: float
    same_answer: Score
    token_f1: Score
    first_token_seconds: float
    num_kv_tokens: int
    kv_bytes: int
    kv_shared: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """`document_fits`: the model has positions for the whole document, a message and an answer."""

    num_conversations: int
    document_fits: bool
    conditions: dict[str, Condition]

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=2)

    def as_table(self) -> Table:
        """For a terminal: a row a figure, a column a condition."""
        shown = self.as_result_table()
        table = Table(
            title=shown.title, title_justify="left", caption=shown.note, caption_justify="left"
        )
        for place, name in enumerate(shown.header):
            table.add_column(name, justify="right" if place else "left")
        for row in shown.rows:
            table.add_row(*row)
        return table

    def as_result_table(self) -> ResultTable:
        """For the report."""
        found = list(self.conditions.values())
        rows = (
            ("nats from the teacher ↓", *(f"{c.divergence:.4f}" for c in found)),
            ("same token, % ↑", *(f"{c.same_token:.1f}" for c in found)),
            ("same answer, % ↑", *(_shown(c.same_answer) for c in found)),
            ("answer's token F1, % ↑", *(_shown(c.token_f1) for c in found)),
            ("first token, ms ↓", *(f"{1000 * c.first_token_seconds:.1f}" for c in found)),
            ("tokens before ↓", *(f"{c.num_kv_tokens:,}" for c in found)),
            ("K/V bytes, once ↓", *(_bytes(c, shared=True) for c in found)),
            ("K/V bytes a request ↓", *(_bytes(c, shared=False) for c in found)),
        )
        return ResultTable(
            title=f"Prefix and document on {self.num_conversations} held-out conversations",
            header=("", *(_SHOWN[name] for name in self.conditions)),
            rows=rows,
            note=self._note(),
        )

    def _note(self) -> str:
        told = (
            "The teacher is the base that has the conversation's part of the document in its prompt. Nats a token of its "
            "answers, teacher-forced, as is the share of tokens that it finds most probable too; greedy answers beside its "
            "greedy answers; median time of one request at a time; what stands before the prompt, and its K/V."
        )
        if not self.document_fits:
            told += " The whole document has more tokens than the model has positions for."
        return told


def comparison_tables(folder: Path) -> Sequence[ResultTable]:
    """The comparison that is kept in a run folder, for its report; none if there is none, or none that can be read."""
    try:
        found = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
        conditions = {name: _condition(fields) for name, fields in found["conditions"].items()}
        kept = Comparison(found["num_conversations"], found["document_fits"], conditions)
        return (kept.as_result_table(),)
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _condition(fields: dict[str, Any]) -> Condition:
    scores = {name: Score(**fields[name]) for name in ("same_answer", "token_f1")}
    return Condition(**(fields | scores))


def _shown(value: Score) -> str:
    return f"{value.value:.1f} ± {value.standard_error:.1f}"


def _bytes(condition: Condition, *, shared: bool) -> str:
    return f"{condition.kv_bytes:,}" if condition.kv_shared == shared else "0"
