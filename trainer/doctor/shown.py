"""Findings for a terminal and for programs. Pure; called by `cli_doctor` and at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from trainer.doctor.finding import Finding, Severity

NOTHING_FOUND: Final = "doctor: nothing found; none of the known failure modes shows in this run"

_STYLES: Final = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.ADVICE: "blue"}


def as_boxes(findings: Sequence[Finding]) -> RenderableType:
    """One box each: name and severity, the evidence, the change to make."""
    if not findings:
        return Text(NOTHING_FOUND, style="green")
    return Group(*(_box(finding) for finding in findings))


def as_json(findings: Sequence[Finding]) -> str:
    """A list of objects: name, severity, evidence, change."""
    found = [
        {
            "name": finding.name.value,
            "severity": finding.severity.name.lower(),
            "evidence": finding.evidence,
            "change": finding.change,
        }
        for finding in findings
    ]
    return json.dumps(found, indent=2, ensure_ascii=False)


def _box(finding: Finding) -> RenderableType:
    style = _STYLES[finding.severity]
    title = f"{finding.severity.name.lower()}: {finding.name.replace('_', ' ')}"
    text = Text.assemble(finding.evidence, "\n", ("Change: ", "bold"), finding.change)
    return Panel(text, title=Text(title, style=f"bold {style}"), title_align="left", style=style)
