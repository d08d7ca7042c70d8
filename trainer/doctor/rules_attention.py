"""Prefixes that are there and not read: no attention at all, or all of it on the first row. Pure."""

from __future__ import annotations

from typing import Final

from trainer.doctor.case import Case, share
from trainer.doctor.finding import Failure, Finding, Severity

DEAD: Final = 0.05
"""Of the attention that the prefix would get if all tokens got the same, in the median layer. Sane runs give a prefix
of 16 tokens 0.5 to 2 of that, and one of a single token, which still took a third of the loss away, 0.3."""

CAPTURED: Final = 0.8
"""Attention on row 0 in the median layer. Trained models rest much attention on their first token, up to this much in
many layers, and that is sound; so a capture also needs one of the two signs below."""

CAPTURE_GROWTH: Final = 0.3  # by so much training itself moved attention to row 0


def dead_prefix(case: Case) -> Finding | None:
    """Completion tokens do not look at the prefix, and it did not help them."""
    attention = case.signals.attention
    if attention is None or case.is_solved:
        return None
    least = DEAD * case.even_share
    if attention.median_last >= least or not case.ended_where_it_began:
        return None
    return Finding(
        Failure.DEAD_PREFIX,
        Severity.ERROR,
        f"Completion tokens give the prefix {share(attention.median_last)} of their attention in the median layer and "
        f"{share(max(attention.last))} in the best; at first it was {share(attention.median_first)} in the median, and if all "
        f"tokens got the same it would be {share(case.even_share)}. Without attention there is no gradient either.",
        "Start from a text or from training examples, and lower the learning rate if it had attention at first; with "
        "a sliding window, see that the prompts are shorter than it.",
    )


def sink_captured(case: Case) -> Finding | None:
    """Row 0 takes nearly all attention, so that neither the other rows nor the prompt are read."""
    sink, attention = case.signals.sink, case.signals.attention
    if sink is None or attention is None or sink.median_last < CAPTURED:
        return None
    grown = sink.median_last - sink.median_first >= CAPTURE_GROWTH
    if not (grown or case.prompts_matter is False or case.hardly_improved):
        return None
    layers = sum(mass >= CAPTURED for mass in sink.last)
    blind = (
        " Completions no longer depend on their prompts." if case.prompts_matter is False else ""
    )
    return Finding(
        Failure.SINK_CAPTURED,
        Severity.ERROR,
        f"Row 0 of the prefix takes {share(sink.median_last)} of all attention in the median layer, and more than "
        f"{share(CAPTURED)} in {layers} of {len(sink.last)} layers; at first it was {share(sink.median_first)}.{blind}",
        "Keep row 0 as the base knows it: start from a text that begins with the tokenizer's first token, freeze it "
        "(num_frozen_tokens 1), and lower the learning rate.",
    )
