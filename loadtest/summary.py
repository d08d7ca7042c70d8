"""From what was recorded to what is reported: one dictionary a run, ready for JSON. Pure, on any thread.

Only requests that were scheduled in the window after the warm-up count. Latencies are in seconds from the scheduled
arrival. Percentiles are over those that have the value; how many have none is said beside them, and `slo` counts them as
missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loadtest.histogram import LogHistogram
from loadtest.recorder import TIERS, Outcome, Recorder

PERCENTILES: Final = (50, 90, 95, 99)
LAG_WARNING_SECONDS: Final = 0.1
COLD: Final = ("host", "disk")


def summarise(record: Recorder, num_tasks: int, slo_ttft: float | None) -> dict[str, Any]:
    """The run's figures."""
    traffic = record.traffic
    counted = traffic.at >= record.warmup_seconds
    seconds = record.window_seconds
    first = (record.first_token - traffic.at)[counted]
    whole = np.where(record.outcome == Outcome.DONE, record.ended - traffic.at, np.nan)[counted]
    outcomes = {o.name.lower(): int(np.sum(record.outcome[counted] == o)) for o in Outcome}
    sent = int(counted.sum())
    result: dict[str, Any] = {
        "tasks": num_tasks,
        "distinct_tasks_asked": len(np.unique(traffic.task[counted])),
        "seconds": seconds,
        "requests": {"scheduled": sent, **outcomes},
        "offered_requests_per_second": sent / seconds,
        "requests_per_second": record.window_done / seconds,
        "output_tokens_per_second": record.window_tokens / seconds,
        "offered_output_tokens_per_second": float(traffic.output_len[counted].sum()) / seconds,
        "ttft": distribution(first),
        "itl": gap_distribution(record.gaps),
        "e2e": distribution(whole),
        "ttft_by_tier": _by_tier(record, counted, first),
        "not_done_by_reason": dict(record.reasons.most_common()),
        "generator_lag": distribution(record.lag[counted]),
    }
    if slo_ttft is not None:
        result["slo"] = {
            "ttft_seconds": slo_ttft,
            "attained": float(np.sum(first <= slo_ttft)) / max(sent, 1),
        }
    result["warnings"] = _warnings(record, result)
    return result


def distribution(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Percentiles of what is no NaN, seconds; nulls without any."""
    known = values[~np.isnan(values)]
    found: Sequence[float | None] = [None] * len(PERCENTILES)
    if len(known):
        found = np.percentile(known, PERCENTILES).tolist()
    return {
        "count": len(known),
        "mean": float(known.mean()) if len(known) else None,
        "max": float(known.max()) if len(known) else None,
        **{f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)},
    }


def gap_distribution(gaps: LogHistogram) -> dict[str, Any]:
    """The same of the gaps between tokens, which are only counted."""
    found = {f"p{p}": gaps.percentile(p) for p in PERCENTILES}
    return {"count": gaps.total, "max": gaps.percentile(100), **found}


def throughput_ratios(runs: Sequence[dict[str, Any]]) -> dict[int, float | None]:
    """Each run's output tokens per second over those of 5 tasks, or of the fewest if none has 5."""
    by_tasks = {run["tasks"]: run["output_tokens_per_second"] for run in runs}
    reference = by_tasks.get(5, by_tasks[min(by_tasks)]) if by_tasks else 0.0
    return {n: rate / reference if reference else None for n, rate in by_tasks.items()}


def _by_tier(
    record: Recorder, counted: npt.NDArray[np.bool_], first: npt.NDArray[np.float64]
) -> dict[str, Any]:
    """`resident`: the prefix was on the device; `cold`: it had to be brought there. Of whole answers."""
    tier = record.tier[counted]
    done = record.outcome[counted] == Outcome.DONE
    groups = {"resident": ("device",), "cold": COLD, "no_prefix": ("none",)}
    groups |= {name: (name,) for name in COLD}
    found = {}
    for group, names in groups.items():
        chosen = done & np.isin(tier, [TIERS.index(name) for name in names])
        if chosen.any():
            found[group] = distribution(first[chosen])
    return found


def _warnings(record: Recorder, result: dict[str, Any]) -> list[str]:
    found = []
    lag = result["generator_lag"]["max"]
    if lag is not None and lag > LAG_WARNING_SECONDS:
        found.append(
            f"the generator fell behind its schedule by up to {lag:.2f} s: it, or its machine, is too slow for this "
            "rate; the latencies include that"
        )
    unfinished = result["requests"]["unfinished"] + result["requests"]["pending"]
    if unfinished:
        found.append(
            f"{unfinished} requests had no whole answer when the run was ended: percentiles of e2e leave them out"
        )
    if not record.window_done:
        found.append("no request was answered within the window")
    return found
