"""Figures as a table for people, one JSON object for programs, and a dated markdown file for the record.

Knows nothing of who competes: the first contestant is ours, the others are its peers.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.contest import Agreement, Result, agreement
from benchmarks.hardware_limits import HardwareLimits, ModelCost
from benchmarks.workload import Workload

_REPOSITORY: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Machine:
    """What ran it: enough to repeat the measurement."""

    date: str
    cpu: str
    cores: int
    threads: int
    memory_gib: float
    versions: Mapping[str, str]
    commit: str

    @classmethod
    def describe(cls, packages: Sequence[str]) -> Machine:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            cpu=_cpu_name(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            memory_gib=round(memory / 2**30, 1),
            versions={"python": platform.python_version()} | {p: version(p) for p in packages},
            commit=_commit(),
        )


def _cpu_name() -> str:
    """The model name, with family and model: virtual machines often hide the rest."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _commit() -> str:
    """The commit, with a plus when files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")


@dataclass(frozen=True, slots=True)
class Report:
    """A finished comparison. `results[0]` is ours."""

    title: str
    benchmark: str
    command: str
    model: str
    machine: Machine
    workload: Workload
    cost: ModelCost
    limits: HardwareLimits
    results: Sequence[Result]
    further_seconds: Mapping[str, float] = field(default_factory=dict)  # by what took them

    def step_limit(self, result: Result) -> float:
        """The least time of this contestant's full decode step, halfway through the output.

        A task's prefix counts once however many rows share it: more need not be read.
        """
        own = self.workload.prompt_len + self.workload.output_len / 2
        prefix_tokens = result.tasks_per_step * self.workload.num_virtual_tokens
        return self.cost.step_seconds(
            self.limits,
            num_rows=result.rows_per_step,
            kv_tokens=result.rows_per_step * own + prefix_tokens,
        )

    def share_of_limit(self, result: Result) -> float:
        return self.step_limit(result) / result.decode_step_seconds

    def ratio(self, peer: Result) -> float:
        """How many times our tokens per second are the peer's."""
        return self.results[0].tokens_per_second / peer.tokens_per_second

    def ratio_range(self, peer: Result) -> tuple[float, float]:
        """Our slowest round over the peer's fastest, and the reverse."""
        ours = [r.tokens_per_second for r in self.results[0].rounds]
        theirs = [r.tokens_per_second for r in peer.rounds]
        return min(ours) / max(theirs), max(ours) / min(theirs)

    def agreements(self) -> dict[tuple[str, str], Agreement]:
        """Of every two contestants, so that ours with a peer can be held against two peers."""
        return {
            (one.name, other.name): agreement(one.tokens(), other.tokens())
            for one, other in combinations(self.results, 2)
        }

    # ---- for people ----------------------------------------------------------------------------

    def table(self) -> str:
        """Markdown, padded so that it reads well in a terminal too."""
        head = (
            "contestant", "tokens/s", "(min to max)", "pass s", "measured", "TTFT p50 s", "TTFT p95 s",
            "TTFT alone s", "rows", "ms/step", "limit ms", "of limit", f"{self.results[0].name} is",
        )  # fmt: skip
        return markdown_table([head, *(self._row(result) for result in self.results)])

    def _row(self, result: Result) -> tuple[str, ...]:
        speeds = [r.tokens_per_second for r in result.rounds]
        return (
            result.name,
            f"{result.tokens_per_second:.1f}",
            f"{min(speeds):.1f} to {max(speeds):.1f}",
            f"{result.pass_seconds:.1f}",
            f"{result.share_measured:.0%}",
            f"{result.ttft_median:.2f}",
            f"{result.ttft_p95:.2f}",
            f"{result.ttft_alone:.2f}",
            str(result.rows_per_step),
            f"{result.decode_step_seconds * 1000:.1f}",
            f"{self.step_limit(result) * 1000:.1f}",
            f"{self.share_of_limit(result):.0%}",
            "" if result is self.results[0] else f"{self.ratio(result):.1f}x",
        )

    def notes(self) -> list[str]:
        """What the table needs beside it."""
        return self.setting_notes() + self.contest_notes()

    def setting_notes(self) -> list[str]:
        """Machine, programs and model: one and the same for all contests of a run."""
        machine, limits, cost = self.machine, self.limits, self.cost
        versions = ", ".join(f"{name} {v}" for name, v in machine.versions.items())
        lines = [
            f"machine: {machine.cpu}, {machine.cores} cores, {machine.threads} threads used, "
            f"{machine.memory_gib} GiB",
            f"versions: {versions}; prefixd at commit {machine.commit}",
            f"model: {self.model}, {cost.num_params / 1e6:.1f} M parameters, random weights",
            f"limits measured in this run: read {limits.read_bytes_per_second / 1e9:.1f} GB/s, "
            f"multiply {limits.flops_per_second / 1e9:.0f} GFLOP/s",
        ]
        return lines + [f"{what}: {s:.1f} s" for what, s in self.further_seconds.items()]

    def contest_notes(self) -> list[str]:
        """What was asked, who answered how, on how quiet a machine, and whether all agreed."""
        lines = [f"workload: {self.workload.describe()}; rounds taken in turns"]
        for result in self.results:
            loads = ", ".join(f"{r.load_average:.2f}" for r in result.rounds)
            others = ", ".join(f"{r.other_cores:.2f}" for r in result.rounds)
            lines.append(
                f"{result.name}: {result.description}; {len(result.rounds)} of {result.num_tried} rounds "
                f"count, the quietest; load average before rounds {loads}; cores used by "
                f"other processes during them {others}"
            )
        for peer in self.results[1:]:
            low, high = self.ratio_range(peer)
            lines.append(
                f"{self.results[0].name} / {peer.name}: {self.ratio(peer):.2f} ({low:.2f} slowest round to "
                f"fastest, {high:.2f} the reverse)"
            )
        return lines + [_describe_agreement(pair, a) for pair, a in self.agreements().items()]

    def text(self) -> str:
        return "\n".join([self.table(), "", *self.notes()])

    def markdown(self) -> str:
        """The report to keep: `benchmarks/README.md` says what it must contain."""
        lines = [
            f"# {self.title}",
            "",
            f"{self.machine.date}, `{self.command}`",
            "",
            self.table(),
            "",
        ]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes()), ""])

    # ---- for programs --------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """Everything, ready for JSON: seconds, bytes, shares of one."""
        peers = self.results[1:]
        return {
            "benchmark": self.benchmark,
            "command": self.command,
            "machine": asdict(self.machine),
            "model": self.model,
            "workload": asdict(self.workload),
            "cost": asdict(self.cost),
            "limits": asdict(self.limits),
            "contestants": {r.name: self._figures(r) for r in self.results},
            "further_seconds": dict(self.further_seconds),
            "agreement": {f"{a} {b}": asdict(x) for (a, b), x in self.agreements().items()},
            "ratios": {f"vs_{r.name}": round(self.ratio(r), 3) for r in peers},
            "ratio_ranges": {
                f"vs_{r.name}": [round(x, 3) for x in self.ratio_range(r)] for r in peers
            },
        }

    def _figures(self, result: Result) -> dict[str, Any]:
        step = result.decode_step_seconds
        return {
            "tokens_per_second": result.tokens_per_second,
            "tokens_per_second_by_round": [r.tokens_per_second for r in result.rounds],
            "num_rounds_tried": result.num_tried,
            "pass_seconds": result.pass_seconds,
            "share_measured": result.share_measured,
            "ttft_median_seconds": result.ttft_median,
            "ttft_p95_seconds": result.ttft_p95,
            "ttft_alone_seconds": result.ttft_alone,
            "rows_per_step": result.rows_per_step,
            "decode_step_seconds": None if math.isnan(step) else step,
            "decode_step_limit_seconds": self.step_limit(result),
            "share_of_limit": None if math.isnan(step) else self.share_of_limit(result),
            "load_average_by_round": [r.load_average for r in result.rounds],
            "other_cores_by_round": [r.other_cores for r in result.rounds],
        }


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; the first column stands left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in cells) + " |"
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _describe_agreement(pair: tuple[str, str], found: Agreement) -> str:
    return (
        f"tokens of {pair[0]} and {pair[1]}: of {found.num_requests} requests that both served, "
        f"{found.identical_share:.0%} have the same throughout; {found.prefix_share:.0%} of the tokens come "
        "before a first difference"
    )
