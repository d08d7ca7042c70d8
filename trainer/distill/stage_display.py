"""What a person sees of a distillation: a bar for each stage, and for training what `prefixd train` shows.

An observer of the loop, and told of the stages around it; on the loop's thread. One thing at a time is on the screen.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.live_table import LiveTable, PlainLines, open_display
from trainer.records import Record

_PLAIN_SHARES: Final = 10  # lines of a stage where no one watches


class StageDisplay:
    """A context manager; what it last showed stays on the screen."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._open = contextlib.ExitStack()
        self._stage = ""
        self._said = -1
        self._training: LiveTable | PlainLines | None = None
        self._bar: Progress | None = None

    def on_record(self, record: Record) -> None:
        """Of training."""
        if self._training is None:
            self._close()
            display = open_display(self._title, self._console)
            self._open.callback(display.__exit__, None, None, None)
            self._training = display.__enter__()
        self._training.on_record(record)

    def on_stage(self, stage: str, done: int, total: int) -> None:
        """Of what comes before training and behind it."""
        if stage != self._stage:
            self._close()
            self._stage, self._said = stage, -1
            if self._console.is_terminal:
                self._bar = self._open.enter_context(_bar(self._console))
                self._bar.add_task(stage, total=total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif done * _PLAIN_SHARES // total > self._said:
            self._said = done * _PLAIN_SHARES // total
            self._console.print(f"{stage}: {done} of {total}", markup=False, highlight=False)

    def _close(self) -> None:
        self._open.close()
        self._training, self._bar, self._stage = None, None, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
