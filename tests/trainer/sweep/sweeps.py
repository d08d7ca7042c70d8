"""Small sweeps and made-up outcomes for the tests of the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.trainer.runs import Recorder, small_run
from trainer.config import RunSettings
from trainer.standard_error import Score
from trainer.sweep.pick import Outcome, Setting
from trainer.sweep.plan import PlannedRun
from trainer.sweep.settings import SweepConfig


def small_sweep(directory: Path, **settings: Any) -> SweepConfig:
    """A sweep of a few steps on the tiny model in `directory`; two lengths, one seed, unless told otherwise."""
    run = small_run(directory)
    shared = run.model_dump(include=set(RunSettings.model_fields), exclude_unset=True)
    defaults: dict[str, Any] = {
        "output": directory / "sweep",
        "num_virtual_tokens": (2, 4),
        "num_steps": 6,
        "evaluate_every": 3,
        "learning_rate": 0.02,
        "num_threads": 1,
    }
    return SweepConfig(**(shared | defaults | settings))


@dataclass
class Watcher(Recorder):
    """A display that remembers."""

    begun: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def on_begin(self, run: PlannedRun, index: int, num_runs: int) -> None:
        self.begun.append(run.name)

    def on_outcome(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def setting(length: int, encoder: str = "direct", rate: float = 0.05, **more: Any) -> Setting:
    given: dict[str, Any] = {"init": "examples", "init_text": None} | more
    return Setting(length, encoder, given["init"], given["init_text"], rate)


def outcomes(
    of: Setting, losses: Sequence[float | None], error: float = 0.01, **metrics: Sequence[float]
) -> list[Outcome]:
    """One run a seed; None: it failed. `error`: over the examples. `metrics`: by name, one value a seed."""
    found = []
    for seed, loss in enumerate(losses):
        name = f"{of}-s{seed}"
        if loss is None:
            found.append(Outcome(name, of, seed, "failed", "Diverged: the loss is nan"))
            continue
        scores = {"loss": Score(loss, error)}
        scores |= {metric: Score(values[seed], 1.0) for metric, values in metrics.items()}
        found.append(
            Outcome(name, of, seed, "finished", scores=scores, prefix="sha256:0", best_step=7, num_steps=9, seconds=3.0)
        )  # fmt: skip
    return found
