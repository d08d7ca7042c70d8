"""The trainer's commands as a person types them, in this process or in one of their own. Called by tests only."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from trainer.__main__ import main

_START_SECONDS = 120.0


def flags_of(config: BaseModel) -> list[str]:
    """The settings that were given, as flags; several values of one follow each other."""
    found: list[str] = []
    for name, value in config.model_dump(mode="json", exclude_unset=True).items():
        values = value if isinstance(value, list) else [value]
        found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def run_here(*arguments: str) -> int:
    """The exit code."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    code = caught.value.code
    assert isinstance(code, int)
    return code


def run_apart(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As `prefixd ...`, to its end."""
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def stopped(arguments: Sequence[str], log: Path, number: signal.Signals) -> tuple[int, str]:
    """Exit code and output of a run that gets the signal once its log has a few steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server", *arguments], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_bytes().count(b'"kind": "step"') > 3:
            break
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out
