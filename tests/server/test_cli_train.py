"""The trainer's commands: handed on whole, and in this process's place."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import pytest

from server.cli import main


class Replaced(BaseException):
    """This process is another program now."""


@pytest.mark.parametrize("command", ["train", "sweep", "doctor", "evaluate", "hand-over"])
def test_all_arguments_go_to_the_trainer(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[str, list[str]]] = []

    def execv(program: str, line: list[str]) -> NoReturn:
        lines.append((program, line))
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    given = ["a.safetensors", "--data", "b", "--json", "-h", "--help", "--version"]

    with pytest.raises(Replaced):
        main([command, *given])

    assert lines == [(sys.executable, [sys.executable, "-P", "-m", "trainer", command, *given])]
