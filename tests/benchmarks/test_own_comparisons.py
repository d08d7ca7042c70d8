"""prefixd held against itself: many tasks against one, the server against its engine."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import many_tasks, server_overhead
from benchmarks.prefixd_contestant import Prefixd
from benchmarks.workload import SCALES, random_prefixes, write_model

TINY = ["--scale", "tiny", "--dtype", "float32", "--repeats", "1", "--threads", "1"]


def _figures(main: Callable[[Sequence[str]], None], *flags: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*TINY, *flags])
    found: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return found


@pytest.mark.parametrize("cold", [True, False])
def test_a_round_that_repeats_prompts_computes_them_all_again(tmp_path: Path, cold: bool) -> None:
    """The prompt cache would have them, and peers have none or are made to forget."""
    scale = SCALES["tiny"]
    work = replace(scale.workload, prompt_len=40)  # two blocks and a half
    write_model(tmp_path / "model", scale, torch.float32)
    prefixes = list(random_prefixes(scale, torch.float32, work.tasks()))
    engine = Prefixd(
        tmp_path / "model", tmp_path / "store", prefixes, kv_cache_bytes=2**23, cold=cold
    )
    computed = []
    try:
        for _ in range(2):
            engine.serve(work.requests(scale.config["vocab_size"]), 2)
            computed.append(sum(step.num_prefill_tokens for step in engine.steps))
    finally:
        engine.close()

    assert computed == [40 * work.num_requests] * 2


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
