"""The comparison of methods end to end at its smallest, its plan and its figures."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import demo
from benchmarks import methods, methods_runner
from benchmarks.methods_plan import (
    FULL,
    METHODS,
    SMALL,
    STAGES,
    Grid,
    Job,
    distinct,
    expected_seconds,
)
from benchmarks.methods_report import chosen_rates, readme_table, spread
from benchmarks.methods_runner import Progress, run_jobs
from benchmarks.methods_training import Workplace, keep, read

TASK = SMALL.tasks[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


def run_small(folder: Path, *flags: str) -> tuple[list[str], dict[str, Any]]:
    """Lines printed, and the figures in the last one."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        methods.main(["--small", "--jobs", "0", "--threads", "1", "--out", str(folder), *flags])
    lines = printed.getvalue().splitlines()
    return lines, json.loads(lines[-1])


@pytest.fixture(scope="module")
def run(folder: Path) -> tuple[list[str], dict[str, Any]]:
    return run_small(folder)


# ---- end to end ------------------------------------------------------------------------------------


def test_every_method_is_judged_with_every_seed(run: Any) -> None:
    _, figures = run

    assert tuple(figures["methods"]) == METHODS
    for entry in figures["methods"].values():
        assert len(entry["exact_match"][TASK]) == len(SMALL.seeds)
        assert len(entry["seconds"]) == len(entry["peak_bytes"]) == len(SMALL.seeds)
        assert entry["num_diverged"] == 0


def test_a_folded_mlp_is_stored_as_what_it_gives_and_not_as_what_was_trained(run: Any) -> None:
    _, figures = run
    mlp, direct, full = (figures["methods"][name] for name in ("mlp", "direct", "full"))

    assert mlp["num_stored"] == direct["num_stored"] == direct["num_trained"] < mlp["num_trained"]
    assert full["num_stored"] == full["num_trained"] > 100 * direct["num_stored"]


def test_training_lowers_the_held_out_loss_of_every_method(run: Any, folder: Path) -> None:
    """At step 0 stands the base with what the method began as."""
    results = [read(path) for path in (folder / "runs").glob("*/training.json")]

    assert {result["run"]["method"] for result in results} == set(METHODS)
    assert all(result["best_step"] > 0 for result in results)


def test_the_studies_have_all_their_points(run: Any) -> None:
    _, figures = run

    sizes = [*map(str, SMALL.low_data_sizes), str(SMALL.num_training)]
    assert {method: list(line) for method, line in figures["low_data"].items()} == dict.fromkeys(
        SMALL.low_data_methods, sizes
    )
    assert list(figures["lengths"][TASK]) == [str(length) for length in SMALL.lengths]


def test_serving_is_measured_at_each_number_of_tasks(run: Any) -> None:
    _, figures = run
    one, two = (figures["serving"][str(count)] for count in SMALL.serving_tasks)

    for kind in ("prefix", "lora", "full"):
        assert one[kind]["tokens_per_second"] > 0
        assert two[kind]["task_bytes"] == 2 * one[kind]["task_bytes"]
    assert [two[kind]["num_calls"] for kind in ("prefix", "lora", "full")] == [1, 1, 2]


def test_the_report_holds_the_tables_that_were_printed_and_both_plots(
    run: Any, folder: Path
) -> None:
    lines, figures = run
    report = (folder / "report.md").read_text()

    table = readme_table(figures, SMALL)
    assert len(table.splitlines()) == 2 + len(METHODS)
    assert table in "\n".join(lines)
    assert table in report
    assert read(folder / "figures.json") == figures
    for name in ("low_data.png", "lengths.png"):
        assert name in report
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, figures = run
    copied = shutil.copytree(folder, tmp_path / "copied")

    def never(*_: Any) -> Any:
        raise AssertionError("a kept result was made again")

    monkeypatch.setattr(methods_runner, "perform", never)
    monkeypatch.setattr(methods, "measure", never)
    _, again = run_small(copied)

    assert again["methods"] == figures["methods"]
    assert again["serving"] == figures["serving"]


def test_a_run_that_was_killed_is_begun_anew(tmp_path: Path) -> None:
    job = Job(SMALL.run("direct", TASK, 5e-2, 0), 0)
    place = Workplace(demo.MODEL_DIR, tmp_path, SMALL.num_validation)
    left_behind = place.of(job.run) / "run" / "checkpoint"
    left_behind.mkdir(parents=True)
    (left_behind / "last.safetensors").write_bytes(b"half")

    run_jobs([job], place, 1)  # in a process of its own

    assert place.is_done(job)
    assert not place.is_done(replace(job, num_test=8))
    assert read(place.training_file(job.run))["peak_bytes"] > 2**20


def test_results_of_another_base_are_not_mixed_in(tmp_path: Path) -> None:
    keep(tmp_path / "base.json", {"model": "sha256:other", "tokenizer": "", "small": True})

    with pytest.raises(SystemExit, match="another base"):
        run_small(tmp_path, "--only", "report")


def test_a_stage_that_needs_learning_rates_says_that_they_are_not_chosen(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run the stage tune before"):
        run_small(tmp_path, "--only", "compare")


# ---- plan and figures ------------------------------------------------------------------------------


def test_a_run_of_two_stages_is_made_once_and_with_all_its_test_items() -> None:
    rates = {method: FULL.rates[method][0] for method in METHODS}
    jobs = distinct([*FULL.tune(), *FULL.compare(rates)])
    shared = FULL.run("direct", FULL.tune_tasks[0], FULL.rates["direct"][0], FULL.seeds[0])

    assert [job.num_test for job in jobs if job.run == shared] == [FULL.num_test]
    assert len({job.key for job in jobs}) == len(jobs)
    assert max(job.num_test for job in distinct(FULL.tune())) == 0


def test_the_whole_plan_has_three_seeds_and_takes_no_longer_than_its_documents_say() -> None:
    rates = {method: FULL.rates[method][1] for method in METHODS}
    jobs = distinct(job for stage in STAGES for job in FULL.jobs(stage, rates))

    assert len(FULL.compare(rates)) == len(METHODS) * len(FULL.tasks) * 3
    assert sum(map(expected_seconds, jobs)) / 2 < 150 * 60


Tried = dict[str, tuple[float, float]]
"""(exact match, loss) by tuning task."""


def kept_tuning(tmp_path: Path, results: dict[float, Tried]) -> tuple[Grid, Workplace]:
    """A grid whose only choice is the rate of `direct`, and results for it."""
    grid = replace(SMALL, rates={**SMALL.rates, "direct": tuple(results)})
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    for job in grid.tune():
        path = place.training_file(job.run)
        path.parent.mkdir(parents=True)
        exact, loss = results.get(job.run.learning_rate, {}).get(job.run.task, (0.0, 1.0))
        held_out = {"exact_match": exact}
        keep(path, {"held_out": held_out, "held_out_loss": loss, "diverged": False})
    return grid, place


def test_the_rate_is_chosen_by_held_out_exact_match_and_then_by_loss(tmp_path: Path) -> None:
    one, other = SMALL.tune_tasks
    grid, place = kept_tuning(
        tmp_path,
        {
            0.01: {one: (90.0, 0.1), other: (95.0, 0.1)},
            0.02: {one: (95.0, 0.4), other: (95.0, 0.1)},
            0.04: {one: (95.0, 0.3), other: (95.0, 0.1)},
        },
    )

    rates = chosen_rates(grid, place)

    assert rates is not None
    assert rates["direct"] == 0.04


def test_a_rate_that_fails_on_one_of_the_tuning_tasks_is_not_chosen(tmp_path: Path) -> None:
    one, other = SMALL.tune_tasks
    grid, place = kept_tuning(
        tmp_path,
        {
            0.05: {one: (99.0, 0.013), other: (99.0, 0.02)},
            0.1: {one: (99.0, 0.009), other: (72.0, 0.3)},
        },
    )

    rates = chosen_rates(grid, place)

    assert rates is not None
    assert rates["direct"] == 0.05


def test_no_rate_is_chosen_while_one_is_not_tried_on_every_tuning_task(tmp_path: Path) -> None:
    grid, place = kept_tuning(tmp_path, {0.01: {}, 0.02: {}})
    assert chosen_rates(grid, place) is not None
    missing = next(job.run for job in grid.tune() if job.run.learning_rate == 0.02)
    place.training_file(missing).unlink()

    assert chosen_rates(grid, place) is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_time_left_follows_the_pace_so_far(clock: list[float]) -> None:
    jobs = [Job(FULL.run("direct", TASK, 5e-2, seed), 0) for seed in range(4)]
    progress = Progress(jobs, 2)
    planned = 4 * expected_seconds(jobs[0]) / 2 / 60
    assert progress.minutes_left() == pytest.approx(planned)

    clock[0] += 60.0
    progress.done(jobs[0].key)

    assert progress.minutes_left() == pytest.approx(3.0)


def test_the_spread_is_the_standard_deviation_over_seeds() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert spread([4.0]) == "4.0"
    assert spread([]) == ""
