"""What is left in a run folder when a run has ended, and what the doctor command says of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.trainer.synthetic_run import SyntheticRun, settling
from trainer.cli_doctor import doctor
from trainer.cli_train import FAILED_RUN
from trainer.conclusion import NoRun, RecordedRun, conclude
from trainer.doctor import Failure, diagnose
from trainer.doctor.shown import NOTHING_FOUND, as_boxes, as_json
from trainer.errors import RunFolderFailed
from trainer.records import MalformedLog

SANE = SyntheticRun(num_steps=40)
FAILED = SyntheticRun(num_steps=40, train=lambda _: 8.0, held=lambda _: 7.8, moved=1e-4)
OVERFITTED = SyntheticRun(
    train=settling(8, 0.03), held=lambda d: settling(7.8, 2.3)(d) + max(d - 0.4, 0.0)
)


def folder_of(run: SyntheticRun, path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(run.config))
    lines = [json.dumps(record) + "\n" for record in run.records()]
    (path / "log.jsonl").write_text("".join(lines))
    return path


def test_a_concluded_run_has_plots_a_report_and_findings(tmp_path: Path) -> None:
    folder = folder_of(FAILED, tmp_path / "my-run")
    [finding] = conclude(folder)
    assert finding.name is Failure.LEARNING_RATE_TOO_LOW
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "log.jsonl",
        "plots",
        "report.html",
    }
    assert {path.stem for path in (folder / "plots").iterdir()} == {
        "loss",
        "rate",
        "attention",
        "norms",
    }
    page = (folder / "report.html").read_text()
    assert "<h1>my-run</h1>" in page
    assert "learning rate too low" in page


def test_what_can_not_be_written_is_the_folders_fault(tmp_path: Path) -> None:
    folder = folder_of(SANE, tmp_path / "run")
    (folder / "plots").write_text("in the way")
    with pytest.raises(RunFolderFailed, match="plots could not be made"):
        conclude(folder)


def test_a_run_that_is_still_going_can_be_judged(tmp_path: Path) -> None:
    folder = folder_of(SyntheticRun(end=None), tmp_path / "run")
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"kind": "st')
    assert RecordedRun.read(folder).findings() == []


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("log.jsonl", None, NoRun, r"no run folder: expected log\.jsonl"),
        ("config.json", None, NoRun, "No such file"),
        ("config.json", "[]", NoRun, "expected a JSON object, got list"),
        ("config.json", "{", NoRun, "expected a JSON object"),
        ("log.jsonl", "?\n", MalformedLog, "line 1"),
    ],
)
def test_a_folder_that_holds_no_run_is_refused(
    tmp_path: Path, name: str, content: str | None, error: type[Exception], match: str
) -> None:
    folder = folder_of(SANE, tmp_path / "run")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(error, match=match):
        RecordedRun.read(folder)


# ---- the command -----------------------------------------------------------------------------------


def test_the_command_says_when_nothing_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(folder_of(SANE, tmp_path / "run")) == 0
    assert NOTHING_FOUND[:40] in capsys.readouterr().out


def test_the_command_shows_findings_and_exits_with_three_for_a_failed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(folder_of(FAILED, tmp_path / "run")) == FAILED_RUN
    shown = capsys.readouterr().out
    assert "error: learning rate too low" in shown
    assert "Change: Raise the learning rate" in shown


def test_a_run_with_warnings_only_did_not_fail(tmp_path: Path) -> None:
    assert doctor(folder_of(OVERFITTED, tmp_path / "run")) == 0


def test_the_command_prints_json_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(folder_of(FAILED, tmp_path / "run"), json=True)
    [found] = json.loads(capsys.readouterr().out)
    assert found["name"] == "learning_rate_too_low"
    assert found["severity"] == "error"
    assert set(found) == {"name", "severity", "evidence", "change"}


def test_the_command_draws_the_report_anew(tmp_path: Path) -> None:
    folder = folder_of(SANE, tmp_path / "run")
    doctor(folder)
    assert not (folder / "report.html").exists()
    doctor(folder, report=True)
    assert (folder / "report.html").exists()


def test_text_of_the_run_is_no_markup_on_the_terminal() -> None:
    run = SyntheticRun(warnings=["other_template"])
    records = run.records()
    records[1]["message"] = "[red]not a style[/red]"
    console = Console(width=200, color_system=None)
    with console.capture() as shown:
        console.print(as_boxes(diagnose(records, run.config)))
    assert "[red]not a style[/red]" in shown.get()
    assert json.loads(as_json([])) == []
