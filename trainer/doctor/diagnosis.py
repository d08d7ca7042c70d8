"""All rules over one run. Pure, on any thread; called at the end of a run and by the `doctor` command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from trainer.doctor.case import Case
from trainer.doctor.finding import Finding, Severity
from trainer.doctor.rules_attention import dead_prefix, sink_captured
from trainer.doctor.rules_data import overfitting, task_mismatch, template_mismatch
from trainer.doctor.rules_learning import (
    learning_rate_too_high,
    learning_rate_too_low,
    no_improvement,
    prefix_too_short,
)
from trainer.doctor.rules_stability import exploding_norms, loss_spikes, not_a_number
from trainer.doctor.signals import measure
from trainer.doctor.summary import DataSummary, Settings
from trainer.history import History
from trainer.records import Record

_CAUSES: Final[tuple[Callable[[Case], Finding | None], ...]] = (
    not_a_number,
    learning_rate_too_high,
    loss_spikes,
    sink_captured,
    dead_prefix,
    exploding_norms,
    template_mismatch,
    task_mismatch,
    learning_rate_too_low,
    overfitting,
)
"""By how directly a rule sees its cause; of equally severe findings the first is the one to begin with."""

_IF_NOTHING_ELSE: Final[tuple[Callable[[Case], Finding | None], ...]] = (
    prefix_too_short,  # a run that failed for another reason says nothing about its length
    no_improvement,
)


def diagnose(
    records: Iterable[Record], config: Mapping[str, Any], data: DataSummary | None = None
) -> list[Finding]:
    """What is wrong with a run, the worst first; empty for a sane one.

    `data`: from the run's first record if left out. Of `config` only num_virtual_tokens is read, where that record
    does not have it. What is not known is not judged.
    """
    history = History.of(records)
    begin = history.begin or {}
    settings = Settings.of(config, begin)
    case = Case(history, measure(history), settings, data or DataSummary.of(begin))
    found = [finding for rule in _CAUSES if (finding := rule(case)) is not None]
    for rule in _IF_NOTHING_ELSE:
        if not any(finding.severity >= Severity.WARNING for finding in found):
            found += [finding for finding in (rule(case),) if finding is not None]
    return sorted(found, key=lambda finding: -finding.severity)
