"""`train`: learn the prefix of a task. A command of `python -m trainer`, on the main thread.

Heavy libraries are imported when it runs, so that its help appears at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

from cyclopts import Parameter
from rich.console import Console

from trainer.config import TrainConfig
from trainer.errors import BadSetting

INTERRUPTED: Final = 130


class _StopRequest:
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
    config: TrainConfig | None = None,
) -> int:
    """Learn a prefix from examples, and leave it in a run folder."""
    if (resume is None) == (config is None):
        raise BadSetting("expected --data and --output for a new run, or --resume FOLDER alone")
    from trainer import session
    from trainer.progress_lines import ProgressLines

    stop = _StopRequest()
    console = Console(stderr=not sys.stdout.isatty())
    with ProgressLines(console) as lines:
        attachments = session.Attachments(observers=(lines,), should_stop=lambda: stop.asked)
        if resume is not None:
            result = session.resume(resume, attachments)
        else:
            assert config is not None, "checked above"
            result = session.train(config, attachments)
    if result.reason == "interrupted":
        print(
            f"stopped at step {result.num_steps}; to go on: prefixd train --resume {result.folder}"
        )
        return INTERRUPTED
    print(f"{result.reason}; best held-out loss {result.best_loss:.4f} at step {result.best_step}")
    print(f"prefix: {result.prefix}")
    return 0
