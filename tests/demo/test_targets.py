"""The build refuses a demo that misses a target, and says which."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from demo import SCORES_FILE
from demo.build.targets import missed

Report = dict[str, Any]


def _seeds(report: Report, task: str) -> list[Report]:
    return list(report["tasks"][task]["seeds"].values())


def weaker_prefix(report: Report) -> None:
    for seed in _seeds(report, "sentiment"):
        seed["test"]["exact_match"] = 89.0


def two_weak_tasks(report: Report) -> None:
    for task in ("sentiment", "record-qa"):
        report["tasks"][task]["full_fine_tuning"]["test"]["exact_match"] = 94.0
        for seed in _seeds(report, task):
            seed["test"]["exact_match"] = 94.0


def behind_full(report: Report) -> None:
    report["tasks"]["sentiment"]["full_fine_tuning"]["test"]["exact_match"] = 100.0
    for seed in _seeds(report, "sentiment"):
        seed["test"]["exact_match"] = 95.5


def able_base(report: Report) -> None:
    report["tasks"]["sentiment"]["base"]["exact_match"] = 5.2


def unsure_prefix(report: Report) -> None:
    _seeds(report, "sentiment")[1]["test_loss"] = 0.11


def wrong_task(report: Report) -> None:
    report["wrong_task_exact_match"]["sentiment"]["record-qa"] = 6.0


def costly_bf16(report: Report) -> None:
    report["tasks"]["sentiment"]["shipped"] |= {"float32": 100.0, "served_bf16": 97.9}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (weaker_prefix, "below 90"),
        (two_weak_tasks, "2 tasks below 95"),
        (behind_full, "behind full fine-tuning"),
        (able_base, "the base alone"),
        (unsure_prefix, "teacher-forced loss 0.11"),
        (wrong_task, "the prefix of sentiment answers 6.0 % of record-qa"),
        (costly_bf16, "served_bf16 costs more"),
    ],
)
def test_a_missed_target_is_named(spoil: Callable[[Report], None], told: str) -> None:
    report = copy.deepcopy(json.loads(SCORES_FILE.read_text()))
    spoil(report)

    assert any(told in miss for miss in missed(report))
