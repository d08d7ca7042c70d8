"""The results as rows of text: one set of tables, for the terminal and for the report. Pure, on any thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from loadtest.summary import COLD, PERCENTILES, throughput_ratios
from reports.html_page import ResultTable

_NOTHING: Final = "-"
Runs = Sequence[dict[str, Any]]


def tables(runs: Runs) -> list[ResultTable]:
    """All that have rows."""
    found = [throughput(runs), latencies(runs), tiers(runs), refusals(runs), server_counters(runs)]
    return [table for table in found if table.rows]


def throughput(runs: Runs) -> ResultTable:
    """What was offered, what came out, and how that moves with the number of tasks."""
    ratios = throughput_ratios(runs)
    has_slo = any("slo" in run for run in runs)
    rows = []
    for run in runs:
        requests = run["requests"]
        ratio = ratios[run["tasks"]]
        row = [
            name_of(run),
            f"{run['offered_requests_per_second']:.2f}",
            f"{run['requests_per_second']:.2f}",
            f"{run['output_tokens_per_second']:,.1f}",
            _NOTHING if ratio is None else f"{ratio:.3f}",
            f"{requests['done']:,}",
            f"{requests['refused']:,}",
            f"{requests['failed']:,}",
            f"{requests['unfinished'] + requests['pending']:,}",
        ]
        if has_slo:
            row.append(f"{run['slo']['attained']:.1%}")
        rows.append(tuple(row))
    slo = (f"TTFT <= {runs[0]['slo']['ttft_seconds']:g} s",) if has_slo else ()
    header = (
        "tasks",
        "offered req/s",
        "req/s",
        "output tok/s",
        "ratio",
        "done",
        "refused",
        "failed",
        "open",
    )
    reference = 5 if 5 in ratios else min(ratios, default=0)
    note = (
        f"ratio: output tok/s over those of {reference} tasks, of the same traffic but for the tasks; "
        "below capacity it is 1 whatever the server does. open: without a whole answer at the end."
    )
    return ResultTable("Throughput", (*header, *slo), tuple(rows), note)


def latencies(runs: Runs) -> ResultTable:
    """TTFT, gaps between tokens and whole answers, in milliseconds."""
    rows = [
        (name_of(run), what, *_percentiles(run[key]))
        for run in runs
        for what, key in (
            ("TTFT", "ttft"),
            ("ITL", "itl"),
            ("end to end", "e2e"),
            ("sent late by", "generator_lag"),
        )
    ]
    note = (
        "TTFT and end to end count from the scheduled arrival; ITL is the gap between two events with tokens. "
        "sent late by: how far the generator itself was behind, which the latencies include."
    )
    return ResultTable("Latency in milliseconds", _latency_header(""), tuple(rows), note)


def tiers(runs: Runs) -> ResultTable:
    """TTFT by where the prefix was found."""
    rows = [
        (name_of(run), group.replace("_", " "), *_percentiles(found))
        for run in runs
        for group, found in run["ttft_by_tier"].items()
        if group not in COLD or found["count"] < run["ttft_by_tier"]["cold"]["count"]
    ]
    note = "Of whole answers. resident: the prefix was on the device; cold: it came from host memory or disk."
    header = _latency_header("prefix")
    return ResultTable("TTFT in milliseconds, by prefix", header, tuple(rows), note)


def refusals(runs: Runs) -> ResultTable:
    """Why requests had no whole answer."""
    rows = [
        (name_of(run), reason, f"{count:,}")
        for run in runs
        for reason, count in run["not_done_by_reason"].items()
    ]
    return ResultTable(
        "Not answered, by status and reason",
        ("tasks", "reason", "requests"),
        tuple(rows),
    )


def server_counters(runs: Runs) -> ResultTable:
    """How far the server's counters went; those that did not move are left out."""
    rows = [
        (name_of(run), name, f"{value:,.0f}")
        for run in runs
        for name, value in (run["server_counters"] or {}).items()
        if value
    ]
    note = (
        "From /metrics, between the end of the warm-up and the last answer. Lookups: requests by the tier "
        "in which their prefix was found, counted when they end; other clients' are among them."
    )
    return ResultTable(
        "Counters of the server", ("tasks", "counter", "increase"), tuple(rows), note
    )


def milliseconds(seconds: float | None) -> str:
    """Three digits that carry meaning."""
    if seconds is None:
        return _NOTHING
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def name_of(run: dict[str, Any]) -> str:
    """What a run is called in the tables and plots."""
    return str(run["tasks"]) if run["tasks"] else "base"


def _latency_header(of: str) -> tuple[str, ...]:
    return ("tasks", of, *(f"p{p}" for p in PERCENTILES), "max", "count")


def _percentiles(found: dict[str, Any]) -> tuple[str, ...]:
    shown: Callable[[float | None], str] = milliseconds
    return (
        *(shown(found[f"p{p}"]) for p in PERCENTILES),
        shown(found.get("max")),
        f"{found['count']:,}",
    )
