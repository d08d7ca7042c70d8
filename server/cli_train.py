"""`prefixd evaluate` and `prefixd hand-over`: start the trainer, which the server never loads, as a process of its own.

What follows the command is the trainer's, `--help` included.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

from cyclopts import App, Parameter

Arguments = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


def _trainer_app(name: str, text: str) -> App:
    """A command that hands everything on, flags too."""
    command = App(name=name, help=text, help_flags=(), version_flags=())

    @command.default
    def start(*arguments: Arguments) -> int:
        # -P: a directory that happens to be called "trainer" where the user stands is not ours.
        line = [sys.executable, "-P", "-m", "trainer", name, *arguments]
        return subprocess.run(line, check=False).returncode  # noqa: S603 - a list, no shell

    return command


evaluate_app = _trainer_app(
    "evaluate", "Judge a prefix on held-out examples, beside the bare model and a text prompt."
)
hand_over_app = _trainer_app(
    "hand-over", "Upload a prefix, judge it at the server, and promote it if a rule holds."
)
