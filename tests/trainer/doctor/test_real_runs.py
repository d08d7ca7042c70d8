"""Each failure mode is provoked in a real run on the demo model and named rightly; sane runs draw no alarm.

Minutes of training in all: these are the runs that the thresholds of the rules answer to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.doctor.real_runs import asked_otherwise, names, run, start_aimed, told
from trainer.schedule import Schedule

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("record-qa", {"seed": 1}),
        ("record-qa", {"seed": 2, "encoder": "direct", "learning_rate": 0.06}),
        ("sentiment", {"seed": 3, "num_steps": 100}),
        ("record-to-sentence", {"seed": 4, "num_steps": 50}),
        ("sentence-to-record", {"seed": 5, "num_steps": 50, "init_text": None}),
        ("casual-rewrite", {"seed": 6, "num_steps": 50, "schedule": "linear"}),
        ("record-qa", {"seed": 7, "encoder": "soft", "num_virtual_tokens": 8}),
    ],
    ids=["qa-mlp", "qa-direct", "sentiment", "to-sentence", "to-record", "casual", "qa-soft"],
)
def test_a_sane_run_draws_no_alarm(tmp_path: Path, task: str, settings: dict[str, Any]) -> None:
    sane = run(tmp_path, task, **settings)
    assert names(sane) == [], told(sane)


@pytest.mark.parametrize(
    ("expected", "task", "settings"),
    [
        ("learning_rate_too_low", "record-qa", {"learning_rate": 1e-6, "num_steps": 30}),
        ("learning_rate_too_low", "sentiment", {"learning_rate": 1e-4, "encoder": "direct"}),
        ("learning_rate_too_high", "record-qa", {"learning_rate": 0.5}),
        ("learning_rate_too_high", "record-qa", {"learning_rate": 3.0, "encoder": "direct"}),
        ("prefix_too_short", "record-qa", {"num_virtual_tokens": 1}),
        ("task_mismatch", "record-qa", {"shuffled": True}),
        ("task_mismatch", "sentiment", {"shuffled": True, "seed": 1}),
        ("overfitting", "record-qa", {"count": 12, "num_steps": 90}),
        ("not_a_number", "record-qa", {"learning_rate": 1e38, "encoder": "direct"}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_failure_is_named(
    tmp_path: Path, expected: str, task: str, settings: dict[str, Any]
) -> None:
    failed = run(tmp_path, task, **settings)
    assert names(failed)[:1] == [expected], told(failed)


def test_a_prefix_that_no_query_looks_at_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_aimed(monkeypatch, factor=-200.0, count=16)
    failed = run(tmp_path, encoder="direct", learning_rate=0.02, num_steps=40)
    assert names(failed)[:1] == ["dead_prefix"], told(failed)


def test_a_first_row_that_every_query_looks_at_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_aimed(monkeypatch, factor=100.0, count=1)
    failed = run(tmp_path, encoder="direct", learning_rate=0.02, num_steps=40)
    assert names(failed)[:1] == ["sink_captured"], told(failed)


def test_keys_that_were_far_too_long_from_the_start_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_aimed(monkeypatch, factor=60.0, count=16)
    failed = run(tmp_path, encoder="direct", learning_rate=0.02, num_steps=40)
    assert "exploding_norms" in names(failed), told(failed)


def test_a_schedule_that_jumps_leaves_spikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = Schedule.learning_rate

    def jumping(self: Schedule, step: int) -> float:
        return smooth(self, step) * (60 if step in (40, 41) else 1)

    monkeypatch.setattr(Schedule, "learning_rate", jumping)
    failed = run(tmp_path, "sentiment", num_steps=80)
    assert "loss_spikes" in names(failed), told(failed)


def test_prompts_that_clients_write_otherwise_are_a_template_mismatch(tmp_path: Path) -> None:
    failed = run(
        tmp_path, "sentiment", num_steps=100, evaluate_every=20, metrics_for=asked_otherwise
    )
    assert names(failed)[:1] == ["template_mismatch"], told(failed)
