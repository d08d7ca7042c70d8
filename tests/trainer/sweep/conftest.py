"""Drawing curves takes seconds a run; only the tests that look at them draw them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.conclusion import RecordedRun
from trainer.doctor import Finding
from trainer.sweep import runs


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with the doctor, but without curves and reports."""

    def conclude(path: Path) -> list[Finding]:
        return RecordedRun.read(path).findings()

    monkeypatch.setattr(runs, "conclude", conclude)
    monkeypatch.setattr(runs, "write_report", lambda *_: None)
