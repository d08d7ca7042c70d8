"""The end of a run: what the doctor found, the curves and the report, made from the run folder alone.

Called on the main thread when a run has ended, however it ended, and by `python -m trainer doctor` at any time: a run
that is still going has a log too.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from reports.plot_style import PlotsUnavailable
from trainer.distill.comparison_report import comparison_tables
from trainer.doctor import Finding, diagnose
from trainer.errors import RunFolderFailed, TrainerError
from trainer.judgement import result_tables
from trainer.plots import draw_plots
from trainer.records import Record, read_records
from trainer.report import report_html
from trainer.run_folder import RunFolder, write_durably

PLOTS: Final = "plots"
REPORT: Final = "report.html"


class NoRun(TrainerError):
    """The folder holds no run that could be read."""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What a run folder says of its run."""

    path: Path
    config: Mapping[str, Any]
    records: Sequence[Record]

    @classmethod
    def read(cls, path: Path) -> RecordedRun:
        """Raises `NoRun` or `MalformedLog`."""
        folder = RunFolder(path)
        if not folder.log.is_file():
            raise NoRun(f"{path} is no run folder: expected {folder.log.name} in it")
        return cls(path, _config(folder.config), read_records(folder.log))

    def findings(self) -> list[Finding]:
        """The doctor's, the worst first."""
        return diagnose(self.records, self.config)


def conclude(path: Path) -> list[Finding]:
    """Writes the plots and the report of the run in `path`; returns what the doctor found.

    Without matplotlib there are no plots, and the report says why. Raises `NoRun`, `MalformedLog`, `RunFolderFailed`.
    """
    run = RecordedRun.read(path)
    findings = run.findings()
    with contextlib.suppress(PlotsUnavailable):  # told in the report
        _write_plots(path / PLOTS, draw_plots(run.records, run.config))
    title = path.resolve().name
    results = [*result_tables(path), *comparison_tables(path)]
    page = report_html(run.records, run.config, findings, title=title, results=results)
    write_durably(path / REPORT, page.encode())
    return findings


def _write_plots(folder: Path, plots: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunFolderFailed(f"{folder} could not be made: {error.strerror}") from error
    for name, data in plots.items():
        write_durably(folder / f"{name}.png", data)


def _config(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NoRun(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise NoRun(f"{path}: expected a JSON object; {error}") from None
    if not isinstance(found, dict):
        raise NoRun(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
