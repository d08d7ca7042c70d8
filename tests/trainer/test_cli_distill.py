"""`prefixd distill` from the command line: what it prints, and its exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.command_line import flags_of, run_apart, run_here
from tests.trainer.distill.material import tiny_distillation

pytestmark = pytest.mark.usefixtures("own_signals")


def command(tmp_path: Path, **settings: Any) -> list[str]:
    return flags_of(tiny_distillation(tmp_path, num_threads=1, **settings))


def run(*arguments: str) -> int:
    return run_here("distill", *arguments)


def test_prefixd_distill_leaves_a_prefix_and_a_comparison_in_terminal_and_report(
    tmp_path: Path,
) -> None:
    done = run_apart("distill", *command(tmp_path))

    assert done.returncode == 0, done.stderr
    for told in ("nats from the teacher", "first token, ms", "K/V bytes a request"):
        assert told in done.stdout
        assert told in (tmp_path / "run" / "report.html").read_text()
    assert str(tmp_path / "run" / "prefix.safetensors") in done.stdout
    assert "conversations: 20 of 20" in done.stderr
    assert "step 6/6  held-out loss" in done.stderr
    assert (tmp_path / "run" / "comparison.json").is_file()


def test_resume_goes_on_and_takes_no_other_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command(tmp_path)) == 0
    assert run("--resume", str(tmp_path / "run")) == 0
    assert "nats from the teacher" in capsys.readouterr().out
    assert run("--resume", str(tmp_path / "run"), *command(tmp_path)) == 2
    assert "--resume FOLDER alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ([], 2, "expected --document and --output"),
        (["--document", "x.txt"], 2, "output"),
        (["--document", "x.txt", "--output", "run", "--data", "x.jsonl"], 2, "--data"),
        (["--document", "x.txt", "--output", "run", "--init", "text"], 2, "--init"),
        (["--document", "x.txt", "--output", "run", "--select-by", "bleu"], 2, "--select-by"),
        (["--document", "x.txt", "--output", "run", "--top-k", "0"], 2, "top_k"),
        (["--document", "missing.txt", "--output", "run"], 1, "No such file"),
        (["--resume", "missing"], 1, "no distillation"),
    ],
)
def test_a_wrong_request_and_a_failure_have_codes_of_their_own(
    flags: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags) == code
    assert told in " ".join(capsys.readouterr().err.split())
