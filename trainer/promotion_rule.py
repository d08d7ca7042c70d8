"""When a new version replaces the live one: `bleu >= live + 0.5`, parsed strictly. Pure; called by `handover`.

    rule   = metric comparison bound
    metric = exact_match | accuracy | token_f1 | bleu | rouge_l
    comparison = >= | > | <= | <
    bound  = number | live | live + number | live - number

`live` is the same metric of the version that is live now, on the same examples. Scores are in percent.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from trainer.errors import BadSetting
from trainer.metrics import METRICS

_COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_TOKEN: Final = re.compile(r"\s*([A-Za-z_]\w*|\d+(?:\.\d+)?|\.\d+|[<>=!]+|\S)")
_NUMBER: Final = re.compile(r"\d+(\.\d+)?|\.\d+")
_LIVE: Final = "live"
_TOLERANCE: Final = 1e-9  # 96.5 + 0.5 must not miss 97.0 for the way in which it was added up


class BadRule(BadSetting):
    """The rule can not be read; the message says what was expected, and where."""


@dataclass(frozen=True, slots=True)
class PromotionRule:
    """`metric comparison bound`; the bound is `offset`, added to the live version's score if it `needs_live`."""

    text: str
    metric: str
    comparison: str
    needs_live: bool
    offset: float

    def holds(self, candidate: float, live: float | None) -> bool:
        """Whether the candidate's score passes. A rule that needs a live version fails without one."""
        if self.needs_live and live is None:
            return False
        difference = candidate - self.bound(live)
        return _COMPARISONS[self.comparison](
            0.0 if abs(difference) < _TOLERANCE else difference, 0.0
        )

    def bound(self, live: float | None) -> float:
        """What the candidate is compared with."""
        assert live is not None or not self.needs_live
        return self.offset + (live or 0.0) * self.needs_live


def parse_rule(text: str) -> PromotionRule:
    """The rule that `text` states. Raises `BadRule`."""
    words = _Words(text)
    metric = words.take("a metric", tuple(METRICS))
    comparison = words.take("a comparison", tuple(_COMPARISONS))
    first = words.take("a number or 'live'")
    if first != _LIVE:
        rule = PromotionRule(text, metric, comparison, False, words.number(first))
    else:
        sign = words.take("'+', '-' or the end", ("+", "-"), may_end=True)
        offset = words.number(words.take("a number")) if sign else 0.0
        rule = PromotionRule(text, metric, comparison, True, -offset if sign == "-" else offset)
    words.end()
    return rule


class _Words:
    """The words of a rule, one after the other."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._words = [(m.start(1), m.group(1)) for m in _TOKEN.finditer(text)]
        self._next = 0
        self._expected = ""

    def take(self, what: str, allowed: tuple[str, ...] = (), *, may_end: bool = False) -> str:
        """The next word, one of `allowed` if there are any; empty at the end where that `may_end`."""
        self._expected = f"{what} ({', '.join(allowed)})" if allowed and not may_end else what
        if self._next == len(self._words):
            if may_end:
                return ""
            raise self._bad("the end")
        word = self._words[self._next][1]
        if allowed and word not in allowed:
            raise self._bad(repr(word))
        self._next += 1
        return word

    def number(self, word: str) -> float:
        """The word just taken, as a number."""
        if _NUMBER.fullmatch(word) is None:
            self._next -= 1
            raise self._bad(repr(word))
        return float(word)

    def end(self) -> None:
        """Nothing more may come."""
        if self._next < len(self._words):
            self._expected = "the end"
            raise self._bad(repr(self._words[self._next][1]))

    def _bad(self, got: str) -> BadRule:
        at = self._words[self._next][0] if self._next < len(self._words) else len(self._text)
        return BadRule(
            f"--promote-if {self._text!r}: expected {self._expected} at character {at + 1}, got {got}; "
            "a rule is like 'bleu >= live + 0.5' or 'exact_match >= 95'"
        )
