"""How good texts are: pure functions over predictions and references. Called by `evaluate` and `handover`.

Every score but loss and perplexity is in percent, 0 to 100, as sacrebleu has it. Each metric is also given as
rows of sums, one row an example, whose column totals give the score: that is what resampling needs, and it makes
BLEU, which is no mean over examples, no special case.

    exact_match   the text is the reference; white space before either is forgiven, which joins it to the prompt
    accuracy      the label is the reference: both without the white space around them
    token_f1      SQuAD's: lower case, no punctuation, no articles; harmonic mean of precision and recall of words
    bleu          sacrebleu's corpus BLEU with its defaults (13a tokens, exponential smoothing)
    rouge_l       rouge-score's rougeL F-measure without stemming, a mean over examples; it sees a-z and 0-9 only
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trainer.errors import BadSetting, TrainerError

Rows = list[tuple[float, ...]]
"""One row of sums for each example."""

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
_MAX_NGRAM: Final = 4


@dataclass(frozen=True, slots=True)
class Metric:
    """`rows` gives each example's sums; `value` turns their totals into the score.

    `yes_or_no`: each example scores 0 or 100, so that the standard error of a share applies.
    """

    name: str
    rows: Callable[[Sequence[str], Sequence[str]], Rows]
    value: Callable[[Sequence[float]], float]
    yes_or_no: bool = False

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        """The score of all examples together. There must be at least one."""
        rows = self.rows(predictions, references)
        assert rows, "no examples, no score"
        return self.value(totals(rows))


def totals(rows: Rows) -> list[float]:
    """Column sums."""
    return [math.fsum(column) for column in zip(*rows, strict=True)]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts that are their reference."""
    return METRICS["exact_match"](predictions, references)


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of labels that are right: a label is the completion without the white space around it."""
    return METRICS["accuracy"](predictions, references)


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of words, after SQuAD's normalisation."""
    return METRICS["token_f1"](predictions, references)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """sacrebleu's corpus BLEU. Raises `TrainerError` where it is not installed."""
    return METRICS["bleu"](predictions, references)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F-measure of the longest common subsequence. Raises `TrainerError` where rouge-score is not installed."""
    return METRICS["rouge_l"](predictions, references)


def loss(sums: Sequence[float]) -> float:
    """Nats a token, of total nats and total tokens."""
    return sums[0] / sums[1]


def perplexity(sums: Sequence[float]) -> float:
    """Of total nats and total tokens; infinite where it is too large to write down."""
    try:
        return math.exp(loss(sums))
    except OverflowError:
        return math.inf


def normalised(text: str) -> str:
    """SQuAD's normalisation, in its order: lower case, punctuation out, articles out, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _mean(score: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[str]], Rows]:
    """Rows of (score, 1), which `_percent` makes the mean of."""

    def rows(predictions: Sequence[str], references: Sequence[str]) -> Rows:
        return [(float(score(p, r)), 1.0) for p, r in zip(predictions, references, strict=True)]

    return rows


def _percent(sums: Sequence[float]) -> float:
    return 100.0 * sums[0] / sums[1]


def _same(prediction: str, reference: str) -> float:
    return prediction.lstrip() == reference.lstrip()


def _same_label(prediction: str, reference: str) -> float:
    return prediction.strip() == reference.strip()


def _f1(prediction: str, reference: str) -> float:
    got, wanted = normalised(prediction).split(), normalised(reference).split()
    if not got or not wanted:
        return float(got == wanted)
    num_shared = sum((Counter(got) & Counter(wanted)).values())
    if num_shared == 0:
        return 0.0
    precision, recall = num_shared / len(got), num_shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _bleu_rows(predictions: Sequence[str], references: Sequence[str]) -> Rows:
    """Matched n-grams, all n-grams (1 to 4 each), length of the prediction, length of the reference."""
    scorer = _installed("sacrebleu", "bleu").BLEU()
    rows: Rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        found = scorer.corpus_score([prediction], [[reference]])
        counts = [*found.counts, *found.totals, found.sys_len, found.ref_len]
        rows.append(tuple(float(count) for count in counts))
    return rows


def _bleu_value(sums: Sequence[float]) -> float:
    counts = [int(count) for count in sums]
    scorer = _installed("sacrebleu", "bleu").BLEU
    score = scorer.compute_bleu(
        correct=counts[:_MAX_NGRAM],
        total=counts[_MAX_NGRAM : 2 * _MAX_NGRAM],
        sys_len=counts[-2],
        ref_len=counts[-1],
        smooth_method="exp",
    )
    return float(score.score)


def _rouge_rows(predictions: Sequence[str], references: Sequence[str]) -> Rows:
    scorer = _installed("rouge_score.rouge_scorer", "rouge_l").RougeScorer(["rougeL"])

    def f_measure(prediction: str, reference: str) -> float:
        return float(scorer.score(reference, prediction)["rougeL"].fmeasure)

    return _mean(f_measure)(predictions, references)


def _installed(module: str, metric: str) -> Any:
    """A library of the extra `[train]`, imported when it is used: it costs a third of a second."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise TrainerError(
            f"{metric} needs {error.name}, which is not installed: pip install 'prefixd[train]'"
        ) from None


METRICS: Final[dict[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", _mean(_same), _percent, yes_or_no=True),
        Metric("accuracy", _mean(_same_label), _percent, yes_or_no=True),
        Metric("token_f1", _mean(_f1), _percent),
        Metric("bleu", _bleu_rows, _bleu_value),
        Metric("rouge_l", _rouge_rows, _percent),
    )
}


def require_known(names: Sequence[str]) -> None:
    """Raises `BadSetting` for a name that is no metric of generated text."""
    for name in names:
        if name not in METRICS:
            raise BadSetting(f"metric {name!r}: expected one of {', '.join(METRICS)}")
