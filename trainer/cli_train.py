"""`train`: learn the prefix of a task. A command of `python -m trainer`, on the main thread.

Heavy libraries are imported when it runs, so that its help appears at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter
from rich.console import Console

from trainer.config import TrainConfig
from trainer.errors import BadSetting, Diverged

if TYPE_CHECKING:
    from trainer.report import ResultTable

INTERRUPTED: Final = 130
FAILED_RUN: Final = 3


class StopRequest:
    """Whether someone asked the run to stop: the first Ctrl-C or SIGTERM asks, a second one does not wait."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def train(
    *,
    resume: Annotated[
        Path | None, Parameter(help="Go on with the run in this folder; takes no other setting")
    ] = None,
    doctor: Annotated[
        bool,
        Parameter(negative=(), help="Exit with 3 if the doctor finds that the run failed"),
    ] = False,
    config: TrainConfig | None = None,
) -> int:
    """Learn a prefix from examples, and leave it in a run folder with its curves, a report and what the doctor found."""
    if (resume is None) == (config is None):
        raise BadSetting("expected --data and --output for a new run, or --resume FOLDER alone")
    from trainer import session
    from trainer.live_table import open_display

    stop = StopRequest()
    console = Console(stderr=not sys.stdout.isatty())
    path = resume if config is None else config.output
    assert path is not None, "checked above"
    try:
        with open_display(path.name, console) as display:
            attachments = session.Attachments(observers=(display,), should_stop=lambda: stop.asked)
            if config is None:
                result = session.resume(path, attachments)
            else:
                result = session.train(config, attachments)
    except Diverged:
        conclude_run(path, console)  # when it went wrong, the findings are wanted most
        raise
    if result.reason == "interrupted":
        print(
            f"stopped at step {result.num_steps}; to go on: prefixd train --resume {result.folder}"
        )
        return INTERRUPTED
    failed = conclude_run(path, console)
    print(f"{result.reason}; best held-out loss {result.best_loss:.4f} at step {result.best_step}")
    print(f"prefix: {result.prefix}")
    return FAILED_RUN if failed and doctor else 0


def conclude_run(path: Path, console: Console, results: Sequence[ResultTable] = ()) -> bool:
    """Plots, report with `results`, and findings; whether the doctor found that the run failed."""
    from trainer.conclusion import conclude
    from trainer.doctor.shown import as_boxes

    findings = conclude(path, results)
    console.print(as_boxes(findings))
    return any(finding.failed for finding in findings)
