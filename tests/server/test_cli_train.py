"""The trainer's commands: handed on whole to a process of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from server.cli import main


@pytest.mark.parametrize("command", ["evaluate", "hand-over"])
def test_all_arguments_go_to_a_process_of_the_trainer_and_its_code_comes_back(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []

    def run(line: list[str], *, check: bool) -> Any:
        lines.append(line)
        return subprocess.CompletedProcess(line, 3)

    monkeypatch.setattr(subprocess, "run", run)
    given = ["a.safetensors", "--data", "b", "--json", "-h", "--help", "--version"]

    with pytest.raises(SystemExit) as caught:
        main([command, *given])

    assert caught.value.code == 3
    assert lines == [[sys.executable, "-P", "-m", "trainer", command, *given]]
