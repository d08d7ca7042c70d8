"""`prefixd train` from the command line: what it prints, its exit codes, and how it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefix_store.artifact import decode, digest_of
from tests.trainer.command_line import flags_of, run_apart, run_here, stopped
from tests.trainer.runs import small_run, write_examples
from trainer.cli_train import StopRequest
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("own_signals")


def command(tmp_path: Path, **settings: Any) -> list[str]:
    return flags_of(small_run(tmp_path, num_threads=1, **settings))


def run(*arguments: str) -> int:
    return run_here("train", *arguments)


def test_prefixd_train_leaves_a_prefix_and_says_where(tmp_path: Path) -> None:
    done = run_apart("train", *command(tmp_path))

    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "run" / "prefix.safetensors") in done.stdout
    assert "best held-out loss" in done.stdout
    assert "36 examples to train on, 4 held out" in done.stderr
    assert "step 12/12  held-out loss" in done.stderr
    data = (tmp_path / "run" / "prefix.safetensors").read_bytes()
    assert decode(data, digest_of(data)).manifest.num_virtual_tokens == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_writes_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    flags = command(tmp_path, num_steps=100_000, evaluate_every=50_000)
    code, out = stopped(["train", *flags], RunFolder(tmp_path / "run").log, number)

    assert code == 130
    assert f"prefixd train --resume {tmp_path / 'run'}" in out
    assert RunFolder(tmp_path / "run").checkpoint.is_file()


def test_resume_goes_on_and_takes_no_other_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command(tmp_path)) == 0
    assert run("--resume", str(tmp_path / "run")) == 0
    assert "finished" in capsys.readouterr().out
    assert run("--resume", str(tmp_path / "run"), *command(tmp_path)) == 2
    assert "--resume FOLDER alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ([], 2, "expected --data and --output"),
        (["--data", "x.jsonl"], 2, "output"),
        (["--data", "x.jsonl", "--output", "run", "--encoder", "lora"], 2, "lora"),
        (["--data", "x.jsonl", "--output", "run", "--init", "text"], 2, "init_text"),
        (["--data", "missing.jsonl", "--output", "run"], 1, "No such file"),
        (["--resume", "missing"], 1, "no checkpoint"),
    ],
)
def test_a_wrong_request_and_a_failure_have_codes_of_their_own(
    flags: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags) == code
    assert told in " ".join(capsys.readouterr().err.split())


def test_bad_data_ends_with_its_lines_and_no_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = command(tmp_path)
    write_examples(tmp_path / "data.jsonl", 3)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"prompt": 1}\n')

    assert run(*flags) == 1
    assert "line 4: prompt: expected a text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_a_run_to_stop_is_told_that_it_will(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """A step may take half a minute; who sees nothing asks again, and the second one does not wait."""
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked
        assert signal.getsignal(number) is signal.SIG_DFL

    assert "stopping after the step under way" in capfd.readouterr().err


def test_ctrl_c_is_not_swallowed_once_the_run_is_over() -> None:
    """Judging a prefix may take longer than training it did."""
    before = signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) is not before

    assert signal.getsignal(signal.SIGINT) is before


def test_help_appears_without_the_heavy_libraries() -> None:
    code = "import trainer.__main__, sys; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
