"""One run as the rules see it, and the judgements that several rules share. Frozen and pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trainer.doctor.signals import Signals
from trainer.doctor.summary import DataSummary, Settings
from trainer.history import History

SOLVED_LOSS: Final = 0.1
"""Nats a token. Below it greedy decoding of some ten tokens is nearly always right: nothing needs repair."""

SMALL_GAIN: Final = 0.05
"""Share of the first loss. Even a learning rate 100 times too low for a task takes less away in a whole run; every
sane run on the demo's tasks took more than 0.7."""

NO_GAP: Final = 0.05
"""Of the loss: by so much, and beyond chance, a completion must be more probable behind its own prompt before it depends on
it. Shuffled completions gave -0.06 to 0.13 on 32 held-out examples, the demo's real tasks 0.2 to 40 once they are learned."""

SHORT: Final = 5
"""Tokens. In the paper's length studies quality still rises steeply below it and is nearly flat from ten on."""

LOUD: Final = 0.5
"""Attention on the prefix in the median layer. A prefix of one or two tokens must grow to be heard at all, and drowns
nothing with the fifth of the attention that it then gets."""

EVEN_SHARE: Final = (
    0.1  # where the lengths of prefix and prompts are not known: some 16 tokens before 150
)


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that is known of a run."""

    history: History
    signals: Signals
    settings: Settings
    data: DataSummary

    @property
    def is_solved(self) -> bool:
        best = self.signals.best
        return best is not None and best[1] <= SOLVED_LOSS

    @property
    def hardly_improved(self) -> bool:
        """The held-out loss is nearly where it began, and that was not good."""
        gain = self.signals.gain
        return gain is not None and gain < SMALL_GAIN and not self.is_solved

    @property
    def ended_where_it_began(self) -> bool:
        """Whatever was gained on the way is lost again."""
        first, last = self.signals.held_first, self.signals.held_last
        return first is not None and last is not None and last > (1 - SMALL_GAIN) * first

    @property
    def prompts_matter(self) -> bool | None:
        """Whether completions are more probable behind their own prompts at last; None if it was not measured."""
        gap, loss = self.signals.prompt_gap_last, self.signals.held_last
        return None if gap is None or loss is None else gap > NO_GAP * loss

    @property
    def prompts_never_mattered(self) -> bool:
        """At no evaluation, the one before the first step included."""
        most = self.signals.prompt_share_most
        return most is not None and most <= NO_GAP

    @property
    def is_short(self) -> bool:
        length = self.settings.num_virtual_tokens
        return length is not None and length < SHORT

    @property
    def is_loud(self) -> bool:
        """Whether the prefix takes the larger part of the attention, as far as that is known."""
        attention = self.signals.attention
        return attention is None or attention.median_last >= LOUD

    @property
    def even_share(self) -> float:
        """Attention that the prefix would get if all tokens before the middle of a completion got the same."""
        length, prompt = self.settings.num_virtual_tokens, self.data.prompt_len
        if length is None or prompt is None:
            return EVEN_SHARE
        return length / (length + prompt + (self.data.completion_len or 0) / 2)

    @property
    def growth(self) -> float | None:
        """How many times longer keys or values became, in the median layer, whichever grew more."""
        ratios = [r for r in (self.signals.key_ratio, self.signals.value_ratio) if r is not None]
        grown = [r.median_last / r.median_first for r in ratios if r.median_first > 0]
        return max(grown) if grown else None


def nats(value: float) -> str:
    return f"{value:.3g}"


def share(value: float) -> str:
    return f"{100 * value:.3g} %"
