"""What a person sees of a sweep: two bars on a terminal, and a line for each run that has ended.

An observer of every run's loop; methods run on the main thread, rich draws on one of its own.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trainer.live_table import number
from trainer.records import Record
from trainer.sweep.pick import Outcome
from trainer.sweep.plan import PlannedRun
from trainer.sweep.shown import outcome_line


class SweepDisplay:
    """A context manager. Off a terminal there are the lines alone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._runs = self._bars.add_task("runs", total=None, loss="")
        self._steps = self._bars.add_task("steps", total=None, loss="")
        self._seen: set[str] = set()
        self._place = ""

    def on_begin(self, run: PlannedRun, index: int, num_runs: int) -> None:
        self._place = f"{index}/{num_runs}"
        self._bars.update(self._runs, total=num_runs, completed=index - 1)
        self._bars.reset(self._steps, description=run.name, total=None, loss="")

    def on_record(self, record: Record) -> None:
        match record["kind"]:
            case "begin":
                self._bars.update(self._steps, total=record["num_steps"], completed=record["step"])
            case "step":
                self._bars.update(self._steps, completed=record["step"])
            case "held_out":
                self._bars.update(self._steps, loss=f"held-out loss {number(record['loss'])}")
            case "warning":
                self._warn(str(record.get("message", "")))

    def on_outcome(self, outcome: Outcome) -> None:
        self._bars.advance(self._runs)
        self._say(f"{self._place} {outcome_line(outcome)}")

    def _warn(self, message: str) -> None:
        """Once: the runs share their data."""
        if message not in self._seen:
            self._seen.add(message)
            self._say(f"warning: {message}")

    def _say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()
