"""What a sweep found, and which prefix it picks. Pure; called by `runs`, `shown` and `report`.

The rule is the one of one standard error: of all settings whose score is no worse than the best one's by more than the
best one's standard error, the shortest prefix. It sees scores on held-out examples and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from trainer.config import LOSS
from trainer.standard_error import Score

State: TypeAlias = Literal["finished", "failed", "open"]
OVER_SEEDS: Final = "seeds"
OVER_EXAMPLES: Final = "examples"


@dataclass(frozen=True, slots=True)
class Setting:
    """All that a sweep varies but the seed."""

    num_virtual_tokens: int
    encoder: str
    init: str
    init_text: str | None
    learning_rate: float

    def __str__(self) -> str:
        return f"P = {self.num_virtual_tokens}, {self.encoder}, {self.start}, learning rate {self.learning_rate:g}"

    @property
    def start(self) -> str:
        """What it begins as, short enough for a table."""
        if self.init_text is None:
            return self.init
        text = " ".join(self.init_text.split())
        return f"“{text[:23]}…”" if len(text) > 24 else f"“{text}”"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. `scores`: of its best prefix on the held-out examples, with standard errors over these; none unless
    it finished. `prefix`: the artifact's digest. `findings`: names of what the doctor found.
    """

    name: str
    setting: Setting
    seed: int
    state: State
    error: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    prefix: str | None = None
    best_step: int | None = None
    num_steps: int | None = None
    seconds: float | None = None
    findings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MeanScore:
    """Mean over seeds, and its standard error: over the seeds, or over the examples where there is one seed."""

    value: float
    standard_error: float
    over: str


@dataclass(frozen=True, slots=True)
class Summary:
    """One setting over its seeds. `scores` are of the seeds that finished."""

    setting: Setting
    outcomes: tuple[Outcome, ...]
    scores: Mapping[str, MeanScore]

    @property
    def num_finished(self) -> int:
        return sum(outcome.state == "finished" for outcome in self.outcomes)

    @property
    def complete(self) -> bool:
        """Whether every seed finished: a setting that sometimes fails is not picked."""
        return self.num_finished == len(self.outcomes)


@dataclass(frozen=True, slots=True)
class Pick:
    """`limit`: the worst score that is still as good as the best. `run`: the picked setting's best seed."""

    by: str
    picked: Summary
    best: Summary
    limit: float
    run: Outcome

    @property
    def rule(self) -> str:
        """Why this one, in a sentence."""
        score = self.best.scores[self.by]
        sign, bound = ("+", "at most") if self.by == LOSS else ("-", "at least")
        return (
            f"the smallest prefix within one standard error of the best held-out {self.by.replace('_', ' ')}: "
            f"{bound} {self.limit:.4f} = {score.value:.4f} {sign} {score.standard_error:.4f}, which is the best "
            f"({self.best.setting}) and its standard error over {score.over}"
        )


def summarise(outcomes: Sequence[Outcome]) -> list[Summary]:
    """One summary a setting, shortest prefix first, and otherwise in the order of the runs."""
    groups: dict[Setting, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.setting, []).append(outcome)
    found = [Summary(s, tuple(group), _means(group)) for s, group in groups.items()]
    return sorted(found, key=lambda summary: summary.setting.num_virtual_tokens)


def _means(outcomes: Sequence[Outcome]) -> dict[str, MeanScore]:
    finished = [outcome.scores for outcome in outcomes if outcome.state == "finished"]
    if not finished:
        return {}
    return {name: _mean([scores[name] for scores in finished]) for name in finished[0]}


def _mean(scores: Sequence[Score]) -> MeanScore:
    if len(scores) == 1:
        return MeanScore(scores[0].value, scores[0].standard_error, OVER_EXAMPLES)
    values, count = [score.value for score in scores], len(scores)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return MeanScore(mean, math.sqrt(variance / count), OVER_SEEDS)


def pick(summaries: Sequence[Summary], by: str) -> Pick | None:
    """The shortest prefix within one standard error of the best; of equally short ones the best. None: there is none."""
    complete = [summary for summary in summaries if summary.complete]
    if not complete:
        return None
    worse = 1.0 if by == LOSS else -1.0  # times a score: less is better

    def cost(summary: Summary) -> float:
        return worse * summary.scores[by].value

    best = min(complete, key=cost)
    limit = cost(best) + best.scores[by].standard_error
    near = [best, *(summary for summary in complete if cost(summary) <= limit)]
    picked = min(near, key=lambda summary: (summary.setting.num_virtual_tokens, cost(summary)))
    run = min(picked.outcomes, key=lambda outcome: worse * outcome.scores[by].value)
    return Pick(by, picked, best, worse * limit, run)
