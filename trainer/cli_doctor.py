"""`doctor`: what is wrong with a run, from its folder. A command of `python -m trainer`, on the main thread."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from trainer.cli_train import FAILED_RUN


def doctor(
    run_folder: Annotated[Path, Parameter(help="The folder of a run, ended or still going")],
    *,
    report: Annotated[
        bool, Parameter(negative=(), help="Also draw its plots and report.html anew")
    ] = False,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON")] = False,
) -> int:
    """Name the failure modes of the run in RUN_FOLDER, with the evidence and the change to make.

    The exit code is 3 if the run failed at its purpose, else 0.
    """
    from trainer.conclusion import RecordedRun, conclude
    from trainer.doctor.shown import as_boxes, as_json

    findings = conclude(run_folder) if report else RecordedRun.read(run_folder).findings()
    if json:
        sys.stdout.write(as_json(findings) + "\n")
    else:
        Console().print(as_boxes(findings))
    return FAILED_RUN if any(finding.failed for finding in findings) else 0
