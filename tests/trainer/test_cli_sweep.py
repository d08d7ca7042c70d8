"""`prefixd sweep` from the command line: flags and files, what it prints, its exit codes, and how it stops."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.command_line import flags_of, run_apart, run_here, stopped
from tests.trainer.sweep.sweeps import small_sweep

pytestmark = pytest.mark.usefixtures("own_signals")


def flags(directory: Path, **settings: Any) -> list[str]:
    """A small sweep as a person would type it."""
    return flags_of(small_sweep(directory, **settings))


def run(*arguments: str) -> int:
    return run_here("sweep", *arguments)


def test_prefixd_sweep_prints_a_table_and_the_pick_and_leaves_both(tmp_path: Path) -> None:
    done = run_apart("sweep", *flags(tmp_path, seed=[0, 1]))

    assert done.returncode == 0, done.stderr
    assert "1/4 P2-direct-examples-lr0.02-s0: loss " in done.stderr
    assert "Settings, encoder direct, init examples" in done.stdout
    assert "the smallest prefix within one standard error of the best" in done.stdout
    prefix = Path(done.stdout.split("prefix: ")[1].strip())
    assert prefix.is_file()
    sweep = tmp_path / "sweep"
    found = json.loads((sweep / "sweep.json").read_text())
    assert prefix.parent.name == found["pick"]["run"]
    assert (sweep / "report.html").is_file()
    assert (sweep / "plots" / "length.png").is_file()
    assert (prefix.parent / "report.html").is_file(), "a run has its own report, as always"


@pytest.mark.usefixtures("undrawn_sweep")
def test_a_file_is_a_sweep_too_and_resume_needs_the_folder_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_sweep(tmp_path).model_dump(mode="json", exclude_unset=True)
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(config | {"variants": [{"encoder": "mlp"}, {"seed": [4]}]}))

    assert run(str(file)) == 0
    first = capsys.readouterr()
    assert run("--resume", str(tmp_path / "sweep")) == 0
    again = capsys.readouterr()

    assert "4/4" in first.err
    assert again.out == first.out


@pytest.fixture
def undrawn_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.sweep import runs

    monkeypatch.setattr(runs, "conclude", lambda _: [])
    monkeypatch.setattr(runs, "write_report", lambda *_: None)


def test_a_sweep_that_is_told_to_stop_says_how_to_go_on(tmp_path: Path) -> None:
    given = flags(tmp_path, num_steps=100_000, evaluate_every=50_000)
    log = tmp_path / "sweep" / "runs" / "P2-direct-examples-lr0.02-s0" / "log.jsonl"
    code, out = stopped(["sweep", *given], log, signal.SIGTERM)

    assert code == 130
    assert f"prefixd sweep --resume {tmp_path / 'sweep'}" in out
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [one["state"] for one in found["runs"]] == ["open", "open"]


@pytest.mark.usefixtures("undrawn_sweep")
def test_a_sweep_of_failures_only_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags(tmp_path, learning_rate=[1e38])) == 1
    told = capsys.readouterr()
    assert "nothing to pick" in " ".join(told.err.split())
    assert "0 of 1" in told.out


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        ([], 2, "--data and --output, or a FILE alone"),
        (["s.toml", "--data", "d", "--output", "o"], 2, "or a FILE alone"),
        (["missing.toml"], 2, "No such file"),
        (["--data", "x.jsonl", "--output", "o", "--encoder", "lora"], 2, "lora"),
        (["--data", "x.jsonl", "--output", "o", "--metric", "blue"], 2, "blue"),
        (["--data", "missing.jsonl", "--output", "o"], 1, "No such file"),
        (["--resume", "missing"], 1, "holds no sweep"),
    ],
)
def test_a_wrong_request_and_a_failure_have_codes_of_their_own(
    given: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*given) == code
    assert told in " ".join(capsys.readouterr().err.split())
