"""What the shipped demo has to reach; the build fails when it does not.

Called by ``python -m demo.build scores`` and by the tests, on the report that becomes ``scores.json``.
"""

from collections.abc import Iterator
from statistics import fmean
from typing import Any, Final

BASE_MAX: Final = 5.0
PREFIX_MIN: Final = 95.0
WEAKEST_PREFIX_MIN: Final = 90.0
BEHIND_FULL_MAX: Final = 4.0
LOSS_MAX: Final = 0.1
WRONG_TASK_MAX: Final = 5.0
BF16_MAX_LOSS: Final = 2.0


class TargetsMissed(RuntimeError):
    """The prefixes are not good enough to be shipped."""


def mean_match(task_report: dict[str, Any]) -> float:
    """Exact match on the test set, mean over the training seeds."""
    return fmean(row["test"]["exact_match"] for row in task_report["seeds"].values())


def missed(report: dict[str, Any]) -> list[str]:
    """Every target that is missed, in words."""
    weak = [name for name, row in report["tasks"].items() if mean_match(row) < PREFIX_MIN]
    found = [f"{len(weak)} tasks below {PREFIX_MIN} %: {weak}"] if len(weak) > 1 else []
    for name, row in report["tasks"].items():
        found += [f"{name}: {miss}" for miss in _missed_by(row)]
    for used, row in report["wrong_task_exact_match"].items():
        found += [
            f"the prefix of {used} answers {match} % of {asked}"
            for asked, match in row.items()
            if asked != used and match > WRONG_TASK_MAX
        ]
    return found


def _missed_by(row: dict[str, Any]) -> Iterator[str]:
    mean, base = mean_match(row), row["base"]["exact_match"]
    full, shipped = row["full_fine_tuning"]["test"]["exact_match"], row["shipped"]
    losses = [seed["test_loss"] for seed in row["seeds"].values()]
    if base > BASE_MAX:
        yield f"the base alone reaches {base} %, above {BASE_MAX}"
    if mean < WEAKEST_PREFIX_MIN:
        yield f"the prefix reaches {mean:.1f} %, below {WEAKEST_PREFIX_MIN}"
    if mean < full - BEHIND_FULL_MAX:
        yield f"{mean:.1f} % is more than {BEHIND_FULL_MAX} points behind full fine-tuning ({full})"
    if max(losses) > LOSS_MAX:
        yield f"teacher-forced loss {max(losses)} nats a token, above {LOSS_MAX}"
    for name in ("stored_bf16", "served_bf16"):
        if shipped[name] < shipped["float32"] - BF16_MAX_LOSS:
            yield f"{name} costs more than {BF16_MAX_LOSS} points: {shipped}"
