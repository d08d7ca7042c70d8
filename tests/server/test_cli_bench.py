"""`prefixd bench` is handed on whole, in this process's place, or says what it takes."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import NoReturn

import pytest

from server.cli import main


class Replaced(BaseException):
    """This process is another program now."""


def test_all_arguments_go_to_the_load_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []

    def execv(_: str, line: list[str]) -> NoReturn:
        lines.append(line)
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    given = ["http://gate:8000/", "--tasks", "1", "5", "--json", "-h", "--help", "--version"]

    with pytest.raises(Replaced):
        main(["bench", *given])

    assert lines == [[sys.executable, "-P", "-m", "loadtest", "bench", *given]]


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(SystemExit) as ended:
        main(["bench"])

    assert ended.value.code == 2
    assert "pip install 'prefixd[bench]'" in capsys.readouterr().err
