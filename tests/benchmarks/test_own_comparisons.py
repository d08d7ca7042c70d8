"""prefixd held against itself: many tasks against one, the server against its engine."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import many_tasks, server_overhead

TINY = ["--scale", "tiny", "--dtype", "float32", "--repeats", "1", "--threads", "1"]


def _figures(main: Callable[[Sequence[str]], None], *flags: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*TINY, *flags])
    found: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return found


def test_many_tasks_are_held_against_one() -> None:
    figures = _figures(many_tasks.main, "--registered", "20")

    assert figures["ratios"].keys() == {"vs_one_task", "vs_many_tasks_cold"}
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert (figures["workload"]["num_tasks"], figures["workload"]["requests_per_task"]) == (6, 1)
    warm_and_cold = figures["agreement"]["many_tasks many_tasks_cold"]
    assert warm_and_cold["identical_share"] == 1.0
    assert warm_and_cold["num_distinct"] == 6
    assert figures["agreement"]["many_tasks one_task"]["identical_share"] < 1.0


def test_the_server_gives_its_engines_tokens_and_says_how_fast_it_starts() -> None:
    figures = _figures(server_overhead.main)

    assert figures["ratios"].keys() == {"vs_engine"}
    assert figures["agreement"]["http engine"]["identical_share"] == 1.0
    assert figures["agreement"]["http engine"]["num_distinct"] == 6
    assert figures["further_seconds"]["from the server's start to ready"] > 0
    assert figures["contestants"]["http"]["share_of_limit"] > 0
