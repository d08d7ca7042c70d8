"""Runs that shook themselves to pieces: losses that are no numbers, spikes, norms that exploded. Pure."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Final

from trainer.doctor.case import Case, nats
from trainer.doctor.finding import Failure, Finding, Severity
from trainer.doctor.signals import LayerSignal

EXPLODED: Final = 3.0
"""Times the norm of ordinary tokens, in the median layer. Sane runs end at 0.5 to 1.5, also where the first layer's
values, which are tiny in ordinary tokens, grew tenfold; hence the median."""

OWN_GROWTH: Final = 2.0
"""If training itself made the norms grow by less than this, they were as large from the start."""

SPIKE_LOOK_BACK: Final = 20  # steps whose median and spread a spike is measured by
SPIKE_SPREADS: Final = 8.0
"""Robust standard deviations above the median. The hardest batches of sane runs stand 6.3 above."""
SPIKE_GIVES_BACK: Final = 0.25
"""Of what had been gained until then. The hardest batches of sane runs look like a loss of 0.13 of it."""
SPIKE_LASTS: Final = 2
SPIKE_STAYS: Final = 2.0
"""Robust standard deviations above the median that the mean of so many next steps has. A hard batch is over after one
step; parameters that jumped away come back slowly.
"""
SPIKE_FACTOR: Final = (
    1.5  # times the median: where nothing was gained, any noise gives all of it back
)

_NOT_A_NUMBER_REASONS: Final = frozenset({"diverged", "not_a_number", "nan"})


def not_a_number(case: Case) -> Finding | None:
    """A loss or gradient norm that is NaN or infinite, or a run that ended for that."""
    bad = [
        record["step"]
        for record in (*case.history.steps, *case.history.held_out)
        if any(_is_no_number(record.get(field, 0.0)) for field in ("loss", "grad_norm"))
    ]
    end = case.history.end
    if end is not None and str(end["reason"]).lower() in _NOT_A_NUMBER_REASONS:
        bad.append(case.history.num_steps)
    if not bad:
        return None
    norms = [r["grad_norm"] for r in case.history.steps if not _is_no_number(r.get("grad_norm"))]
    before = f"; the largest gradient norm until then was {nats(max(norms))}" if norms else ""
    return Finding(
        Failure.NOT_A_NUMBER,
        Severity.ERROR,
        f"The loss or a gradient is no number since step {min(bad)}{before}.",
        "Lower the learning rate (a tenth), keep clipping on, and train a float16 base in bfloat16 or float32.",
    )


def loss_spikes(case: Case) -> Finding | None:
    """The training loss jumped, stayed up for steps, and gave back much of what was gained."""
    steps = [record for record in case.history.steps if not _is_no_number(record.get("loss"))]
    spikes = _spikes([float(record["loss"]) for record in steps])
    if not spikes:
        return None
    index, before, peak = max(spikes, key=lambda spike: spike[2] - spike[1])
    return Finding(
        Failure.LOSS_SPIKES,
        Severity.WARNING,
        f"The training loss jumped {len(spikes)} time{'s' * (len(spikes) > 1)}; at step {steps[index]['step']} from "
        f"{nats(before)} to {nats(peak)} nats a token.",
        "Lower the learning rate (a third), lengthen the warm-up, or clip gradients at a smaller norm.",
    )


def exploding_norms(case: Case) -> Finding | None:
    """Keys or values far longer than those of ordinary tokens: attention saturates and stops learning."""
    parts = {"keys": case.signals.key_ratio, "values": case.signals.value_ratio}
    if case.is_short and not case.is_loud:
        return None
    large = {n: r for n, r in parts.items() if r is not None and r.median_last >= EXPLODED}
    if not large:
        return None
    name, ratio = max(large.items(), key=lambda item: item[1].median_last)
    grown = ratio.median_last >= OWN_GROWTH * ratio.median_first
    return Finding(
        Failure.EXPLODING_NORMS,
        Severity.ERROR if case.hardly_improved else Severity.WARNING,
        f"The prefix's {name} are {ratio.median_last:.1f} times as long as those of ordinary tokens in the median "
        f"layer; at first {ratio.median_first:.1f} times. The worst layer is {_worst(ratio)}.",
        "Lower the learning rate (a tenth) or add weight decay."
        if grown
        else "They began so: start from a text or from training examples, whose norms are natural.",
    )


def _worst(ratio: LayerSignal) -> str:
    layer = max(range(len(ratio.last)), key=lambda index: ratio.last[index])
    return f"{layer} with {ratio.last[layer]:.1f} times"


def _spikes(losses: list[float]) -> list[tuple[int, float, float]]:
    """(index, median before, loss there) of the first step of each."""
    found: list[tuple[int, float, float]] = []
    start = median(losses[:5]) if losses else 0.0
    index = SPIKE_LOOK_BACK
    while index + SPIKE_LASTS < len(losses):
        before = losses[index - SPIKE_LOOK_BACK : index]
        middle = median(before)
        spread = 1.4826 * median(abs(loss - middle) for loss in before)
        level = max(
            middle + SPIKE_SPREADS * spread,
            middle + SPIKE_GIVES_BACK * (start - middle),
            middle * SPIKE_FACTOR,
        )
        after = fmean(losses[index + 1 : index + 1 + SPIKE_LASTS])
        if losses[index] > level and after > middle + SPIKE_STAYS * spread:
            found.append((index, middle, losses[index]))
            index += SPIKE_LOOK_BACK  # until the window knows the new level, this is one spike
        index += 1
    return found


def _is_no_number(value: object) -> bool:
    return not isinstance(value, int | float) or not math.isfinite(value)
