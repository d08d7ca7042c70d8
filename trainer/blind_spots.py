"""What a metric can not see: references for which its score says nothing, whatever is answered. Pure.

Called before such a score decides something (which step is kept, which prefix is picked, which version goes live), and
by `evaluate`, which tells it beside the scores.

    bleu       counts runs of four words: where no reference has four, a right answer scores 0 and a wordy one more
    rouge_l    knows a-z and 0-9 only
    token_f1   drops punctuation, and `a`, `an`, `the`: of the label 'A' nothing is left, nor of the answer '-'
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from trainer.errors import BadSetting
from trainer.metrics import METRICS, normalised

_FOUR_WORD_RUNS: Final = 7  # column of `bleu`'s rows: how many the text has
_ROUGE_WORD: Final = re.compile(r"[a-z0-9]")
_OTHERS: Final = "take another metric"


def about_references(metrics: Sequence[str], references: Sequence[str]) -> list[str]:
    """One sentence for each of `metrics` that is blind for all of the references, or for some where each counts by itself."""
    return [told for name in metrics if (told := _told(name, references))]


def require_sight(metric: str, references: Sequence[str], setting: str) -> None:
    """Raises `BadSetting`, naming `setting`, if `metric` is blind for every reference. Any other name passes."""
    if metric in METRICS and _num_unseen(metric, references) == len(references):
        raise BadSetting(f"{setting}: {_told(metric, references)}")


def _told(metric: str, references: Sequence[str]) -> str:
    unseen, count = _num_unseen(metric, references), len(references)
    match metric:
        case "bleu" if unseen == count:
            why = "no reference has four words, so a right answer scores 0"
        case "rouge_l" if unseen:
            why = f"{unseen} of {count} references have no letter a-z and no digit, so a right answer scores 0"
        case "token_f1" if unseen:
            why = (
                f"of {unseen} of {count} references nothing is left without punctuation and a, an, the, "
                "so any answer of which nothing is left is right"
            )
        case _:
            return ""
    return f"{metric} says nothing here: {why}; {_OTHERS}"


def _num_unseen(metric: str, references: Sequence[str]) -> int:
    match metric:
        case "bleu":
            rows = METRICS[metric].rows(references, references)
            return sum(row[_FOUR_WORD_RUNS] == 0 for row in rows)
        case "rouge_l":
            return sum(not _ROUGE_WORD.search(text.lower()) for text in references)
        case "token_f1":
            return sum(not normalised(text) for text in references)
        case _:
            return 0
