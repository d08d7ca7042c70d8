"""What an evaluation found: frozen, as JSON, and as a table for a terminal. Made by `evaluate`; pure."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.finite_json import finite
from trainer.standard_error import Score

PREFIX: Final = "prefix"
NO_PREFIX: Final = "no_prefix"
TEXT_PROMPT: Final = "text_prompt"
LOSS: Final = "loss"
PERPLEXITY: Final = "perplexity"

_SHOWN: Final = {PREFIX: "prefix", NO_PREFIX: "no prefix", TEXT_PROMPT: "text prompt"}
_LARGE: Final = 1e5
_LOWER_IS_BETTER: Final = frozenset({LOSS, PERPLEXITY})


@dataclass(frozen=True, slots=True)
class Condition:
    """The same examples under one condition. `num_cut`: completions that `max_tokens` ended."""

    scores: dict[str, Score]
    num_cut: int


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Perplexity of general text, behind the prefix and without it; `lost` is in nats a token."""

    source: str
    num_tokens: int
    with_prefix: Score
    without: Score
    lost: Score


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A prefix beside its baselines on the same held-out examples, greedy, by the server's engine.

    `conditions`: `prefix`, `no_prefix`, and `text_prompt` where there was a text. `gains`: per baseline, how much
    better the prefix is, with the standard error of the paired difference; for loss and perplexity less is better
    and the gain negative. `notes`: what could not be measured, and why.
    """

    digest: str
    num_virtual_tokens: int
    model_id: str
    num_examples: int
    max_tokens: int
    text_prompt: str | None
    conditions: dict[str, Condition]
    gains: dict[str, dict[str, Score]]
    forgetting: Forgetting | None
    notes: tuple[str, ...] = ()

    def as_json(self) -> str:
        """One JSON object; a number that is none (an infinite perplexity) is null."""
        return json.dumps(finite(dataclasses.asdict(self)), indent=2, ensure_ascii=False)

    def as_table(self) -> RenderableType:
        """What a person reads: one row a metric, one column a condition; what the prefix gains; the probe; the notes."""
        parts: list[RenderableType] = [self._scores(), self._gained()]
        if self.forgetting is not None:
            parts.append(Text(_told(self.forgetting)))
        parts += [Text(f"note: {note}") for note in self.notes]
        return Group(*parts)

    def _scores(self) -> Table:
        title = f"{self.num_examples} held-out examples, P = {self.num_virtual_tokens}"
        table = _table(title, [_SHOWN[name] for name in self.conditions])
        for metric in self.conditions[PREFIX].scores:
            shown = [_score(c.scores[metric], metric) for c in self.conditions.values()]
            table.add_row(_titled(metric), *shown)
        cut = [str(condition.num_cut) for condition in self.conditions.values()]
        table.add_row(f"cut at {self.max_tokens} tokens", *cut)
        return table

    def _gained(self) -> Table:
        columns = [f"against {_SHOWN[name]}" for name in self.gains]
        table = _table("the prefix, example by example", columns)
        for metric in self.conditions[PREFIX].scores:
            shown = [_score(gain[metric], metric, sign="+") for gain in self.gains.values()]
            table.add_row(_titled(metric), *shown)
        return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _titled(metric: str) -> str:
    return f"{metric} {'↓' if metric in _LOWER_IS_BETTER else '↑'}"


def _score(score: Score, metric: str, sign: str = "") -> str:
    """Two decimals, four for the loss; powers of ten where a perplexity is out of all bounds."""
    if not math.isfinite(score.value):
        return "∞" if score.value > 0 else "-"
    digits = 4 if metric == LOSS else 2
    form = f"{sign}.{digits}f" if abs(score.value) < _LARGE else f"{sign}.3g"
    error = f".{digits}f" if score.standard_error < _LARGE else ".3g"
    return f"{score.value:{form}} ± {score.standard_error:{error}}"


def _told(forgetting: Forgetting) -> str:
    return (
        f"general text ({forgetting.source}, {forgetting.num_tokens} tokens): perplexity "
        f"{_score(forgetting.with_prefix, PERPLEXITY)} behind the prefix, "
        f"{_score(forgetting.without, PERPLEXITY)} without; "
        f"{_score(forgetting.lost, LOSS, sign='+')} nats a token"
    )
