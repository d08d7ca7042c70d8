"""`prefixd bench`: becomes the load generator, which the server never loads.

What follows the command is the load generator's, `--help` included.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Annotated, Final

from cyclopts import App, Parameter

from server.errors import ConfigError

_NEEDED: Final = ("numpy", "httptools")

bench_app = App(
    name="bench",
    help="Load a running server as its users would, and measure what they see.",
    help_flags=(),
    version_flags=(),
)


@bench_app.default
def start(*arguments: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> None:
    """Raises `ConfigError` with what to install."""
    if not all(importlib.util.find_spec(name) for name in _NEEDED):
        raise ConfigError("prefixd bench needs more than the server: pip install 'prefixd[bench]'")
    # -P: a directory that happens to be called "loadtest" where the user stands is not ours.
    line = [sys.executable, "-P", "-m", "loadtest", "bench", *arguments]
    # In this process's place: on Ctrl-C it removes the tasks that it made, so the signal must reach it.
    os.execv(sys.executable, line)  # noqa: S606 - a list, no shell
