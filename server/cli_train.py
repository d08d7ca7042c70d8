"""`prefixd train`, `sweep`, `distill`, `doctor`, `evaluate`, `hand-over`: become the trainer, which the server never loads.

What follows the command is the trainer's, `--help` included.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

from cyclopts import App, Parameter

Arguments = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


def _trainer_app(name: str, text: str) -> App:
    """A command that hands everything on, flags too."""
    command = App(name=name, help=text, help_flags=(), version_flags=())

    @command.default
    def start(*arguments: Arguments) -> None:
        # -P: a directory that happens to be called "trainer" where the user stands is not ours.
        line = [sys.executable, "-P", "-m", "trainer", name, *arguments]
        # In this process's place: a run that is told to stop writes a checkpoint first, so the signal must reach it.
        os.execv(sys.executable, line)  # noqa: S606 - a list, no shell

    return command


train_app = _trainer_app("train", "Learn the prefix of a task from examples.")
sweep_app = _trainer_app(
    "sweep", "Train a prefix for each of many settings, and pick the smallest that is good enough."
)
distill_app = _trainer_app(
    "distill", "Learn a prefix that stands for a long document, from the base itself."
)
evaluate_app = _trainer_app(
    "evaluate", "Judge a prefix on held-out examples, beside the bare model and a text prompt."
)
hand_over_app = _trainer_app(
    "hand-over", "Upload a prefix, judge it at the server, and promote it if a rule holds."
)
doctor_app = _trainer_app("doctor", "Name what is wrong with a training run, and what to change.")
