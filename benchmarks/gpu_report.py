"""The figures of `gpu.py` as a table, as one JSON object, and as a dated markdown file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.gpu_shapes import Figure
from benchmarks.report import Machine

_HEADINGS: Final = ("stage", "figure", "value", "unit", "of limit", "target", "met", "note")


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage measured, and why it ended early if it did."""

    name: str
    figures: tuple[Figure, ...]
    seconds: float
    error: str | None = None

    def summary(self) -> str:
        """One line."""
        end = "done" if self.error is None else f"FAILED: {self.error}"
        return f"{self.name}: {len(self.figures)} figures in {self.seconds:.0f} s, {end}"


def _finite(value: float) -> float | None:
    """JSON has no word for the others, and a NaN from a broken kernel must not cost the whole report."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class GpuReport:
    """All stages of one run on one machine."""

    command: str
    machine: Machine
    gpu: str
    results: tuple[StageResult, ...]

    def _all(self) -> list[Figure]:
        return [figure for result in self.results for figure in result.figures]

    def share(self, figure: Figure) -> float | None:
        """Of the limit that this run measured; None without one."""
        found = {f.name: f.value for f in self._all() if f.stage == "ceilings"}
        if not {"copy", "read", "multiply"} <= found.keys():
            return None
        bandwidth = max(found["copy"], found["read"]) * 1e12
        return figure.share_of(bandwidth, found["multiply"] * 1e12)

    def rows(self) -> list[tuple[str, ...]]:
        """The table without its headings."""
        return [
            (
                figure.stage,
                figure.name,
                f"{figure.value:.4g}",
                figure.unit,
                "" if (share := self.share(figure)) is None else f"{share:.0%}",
                "" if figure.target is None else f"{figure.target:g}",
                {None: "", True: "yes", False: "no"}[figure.met],
                figure.note,
            )
            for figure in self._all()
        ]

    def text(self) -> str:
        """The table for a terminal, and what failed."""
        table = [_HEADINGS, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEADINGS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        return "\n".join([f"{self.gpu}, {self.machine.versions}", "", *lines, "", *self._failed()])

    def _failed(self) -> Sequence[str]:
        return [r.summary() for r in self.results if r.error is not None] or ["no stage failed"]

    def markdown(self) -> str:
        """The report for `results/`."""
        facts = [
            f"* date: {self.machine.date}; commit {self.machine.commit}",
            f"* command: `{self.command}`",
            f"* GPU: {self.gpu}; CPU: {self.machine.cpu}, {self.machine.cores} cores",
            f"* versions: {', '.join(f'{k} {v}' for k, v in self.machine.versions.items())}",
        ]
        table = [_HEADINGS, tuple("---" for _ in _HEADINGS), *self.rows()]
        lines = ["| " + " | ".join(row) + " |" for row in table]
        stages = [f"* {r.summary()}" for r in self.results]
        title = "# A CUDA machine, its kernels and the engine on it"
        return "\n".join([title, "", *facts, "", *lines, "", "Stages:", "", *stages, ""])

    def figures(self) -> dict[str, Any]:
        """Everything, for programs. `ratios` above 1 mean that prefixd (or grouping) is faster."""
        return {
            "benchmark": "gpu",
            "command": self.command,
            "machine": asdict(self.machine) | {"gpu": self.gpu},
            "ratios": {f.name: _finite(f.value) for f in self._all() if f.unit == "x"},
            "figures": [
                f.as_dict()
                | {
                    "value": _finite(f.value),
                    "share_of_limit": self.share(f),
                    "target": f.target,
                    "met": f.met,
                }
                for f in self._all()
            ],
            "stages": {r.name: {"seconds": r.seconds, "error": r.error} for r in self.results},
        }
