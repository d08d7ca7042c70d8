"""The comparison of methods end to end at its smallest, and what makes it fair."""

from __future__ import annotations

import contextlib
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import demo
from benchmarks import methods, methods_runner
from benchmarks.contest import Call
from benchmarks.methods_peers import FullTrainee, LoraTrainee, PeerLoop, PromptTrainee
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
from benchmarks.methods_serving import LoraMixed
from benchmarks.methods_training import Workplace, keep, perform, read, settings
from benchmarks.workload import Workload
from demo.build.tasks import TASKS
from trainer.base import FrozenBase, load_base
from trainer.batches import Batch, make_batch
from trainer.initial import initial_prefix
from trainer.prefix_cache import KeyValues
from trainer.prefix_encoder import build_encoder
from trainer.session import gather

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


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return load_base(None, dtype="float32", device="cpu")


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
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, figures = run

    def never(*_: Any) -> Any:
        raise AssertionError("a kept result was made again")

    monkeypatch.setattr(methods_runner, "perform", never)
    monkeypatch.setattr(methods, "measure", never)
    _, again = run_small(folder)

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


def test_results_of_another_base_are_not_mixed_in(folder: Path, run: Any) -> None:
    kept = read(folder / "base.json")
    keep(folder / "base.json", {**kept, "model": "sha256:other"})
    try:
        with pytest.raises(SystemExit, match="another base"):
            run_small(folder, "--only", "report")
    finally:
        keep(folder / "base.json", kept)


def test_a_stage_that_needs_learning_rates_says_that_they_are_not_chosen(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run the stage tune before"):
        run_small(tmp_path, "--only", "compare")


# ---- only the method differs -----------------------------------------------------------------------


def example_batch(base: FrozenBase, tmp_path: Path) -> Batch:
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    run = SMALL.run("prompt", TASK, 5e-2, 0)
    place.of(run).mkdir(parents=True)
    material = gather(settings(run, place), base)
    return make_batch(material.training[:5], base.device)


def test_a_soft_prompt_in_every_row_is_the_keys_and_values_that_it_leaves(
    base: FrozenBase, tmp_path: Path
) -> None:
    batch = example_batch(base, tmp_path)
    trainee = PromptTrainee(base, TASKS[TASK].init_text, 4, seed=0)

    with torch.no_grad():
        torch.testing.assert_close(
            trainee.logits(batch), base.logits(trainee.prefix(), batch), atol=1e-4, rtol=0
        )
        bare = base.logits(None, batch)
        assert not torch.allclose(trainee.logits(batch), bare, atol=0.1)


def test_lora_begins_as_the_base_and_merged_answers_as_before(tmp_path: Path) -> None:
    base = load_base(None, dtype="float32", device="cpu")  # its own, which PEFT will change
    batch = example_batch(base, tmp_path)
    bare = base.logits(None, batch)
    trainee = LoraTrainee(base, seed=0)
    torch.testing.assert_close(trainee.logits(batch), bare, atol=1e-5, rtol=0)
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        adapted = trainee.logits(batch)
        trainee.finish()
        torch.testing.assert_close(base.logits(None, batch), adapted, atol=1e-4, rtol=0)
    assert not torch.allclose(adapted, bare, atol=0.01)


def test_the_peers_loop_takes_the_trainers_steps(tmp_path: Path) -> None:
    """A prefix trained by the peers' loop has the loss that `prefixd train` gives it."""
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    run = SMALL.run("direct", TASK, 5e-2, 1)
    perform(Job(run, 0), place)
    config = settings(run, place)
    material = gather(config)
    base = material.base
    encoder = build_encoder(base, config, initial_prefix(base, config, material.training))

    class Prefix:
        def __init__(self) -> None:
            self.parameters = dict(encoder.named_parameters())

        def logits(self, batch: Batch) -> torch.Tensor:
            return base.logits(encoder(), batch)

        def prefix(self) -> KeyValues:
            return encoder.rows().detached()

        def finish(self) -> Any:
            return base.module

    loop = PeerLoop(base, Prefix(), config, material.training, material.held_out)
    loop.run()

    trained = read(place.training_file(run))
    assert loop.best_step == trained["best_step"]
    assert loop.best_loss == pytest.approx(trained["held_out_loss"], rel=1e-4)


def test_a_loss_that_is_no_number_ends_a_peer_with_its_best_so_far(tmp_path: Path) -> None:
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    run = SMALL.run("full", TASK, 5e-4, 0)
    place.of(run).mkdir(parents=True)
    material = gather(settings(run, place))
    trainee = FullTrainee(material.base)
    before = {name: p.detach().clone() for name, p in trainee.parameters.items()}
    logits = trainee.logits

    class Broken(FullTrainee):
        def __init__(self) -> None:
            self.parameters = trainee.parameters

        def logits(self, batch: Batch) -> torch.Tensor:
            return logits(batch) * float("nan")

    loop = PeerLoop(
        material.base, Broken(), settings(run, place), material.training, material.held_out
    )
    loop.run()

    assert (loop.diverged_step, loop.best_step) == (1, 0)
    assert all(torch.equal(before[name], p) for name, p in trainee.parameters.items())


def test_few_examples_are_another_part_for_each_seed_and_all_are_the_same(tmp_path: Path) -> None:
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    texts = {}
    for seed in (0, 1):
        for method in ("direct", "full"):
            run = FULL.run(method, TASK, 1e-3, seed, size=8)
            place.of(run).mkdir(parents=True)
            texts[method, seed] = settings(run, place).data.read_text()

    assert texts["direct", 0] == texts["full", 0] != texts["direct", 1] == texts["full", 1]
    assert len(texts["direct", 0].splitlines()) == 8


def test_rows_of_one_batch_answer_each_with_its_own_adapter(tmp_path: Path) -> None:
    workload = Workload(2, 2, 4, 8, 6)
    lora = LoraMixed(demo.MODEL_DIR, workload.tasks())
    requests = workload.requests(2_000)
    same = tuple(replace(r, prompt_token_ids=requests[0].prompt_token_ids) for r in requests)
    [together] = [lora.serve(call, 6) for call in lora.calls(same)]

    def alone(index: int) -> Call:
        return lora.serve((same[index],), 6)

    assert together.tokens == tuple(alone(index).tokens[0] for index in range(4))
    assert len(set(together.tokens)) == 2, "an answer for each task"


# ---- plan and figures ------------------------------------------------------------------------------


def test_a_run_of_two_stages_is_made_once_and_with_all_its_test_items() -> None:
    rates = {method: FULL.rates[method][0] for method in METHODS}
    jobs = distinct([*FULL.tune(), *FULL.compare(rates)])
    shared = FULL.run("direct", FULL.tune_task, FULL.rates["direct"][0], FULL.seeds[0])

    assert [job.num_test for job in jobs if job.run == shared] == [FULL.num_test]
    assert len({job.key for job in jobs}) == len(jobs)
    assert max(job.num_test for job in distinct(FULL.tune())) == 0


def test_the_whole_plan_has_three_seeds_and_fits_into_an_hour_and_a_half() -> None:
    rates = {method: FULL.rates[method][1] for method in METHODS}
    jobs = distinct(job for stage in STAGES for job in FULL.jobs(stage, rates))

    assert len(FULL.compare(rates)) == len(METHODS) * len(FULL.tasks) * 3
    assert sum(map(expected_seconds, jobs)) / 2 < 90 * 60


def kept_tuning(
    tmp_path: Path, results: dict[float, tuple[float, float]]
) -> tuple[Grid, Workplace]:
    """A grid whose only choice is the rate of `direct`, and results (exact match, loss) for it."""
    grid = replace(SMALL, rates={**SMALL.rates, "direct": tuple(results)})
    place = Workplace(demo.MODEL_DIR, tmp_path, 4)
    for job in grid.tune():
        path = place.training_file(job.run)
        path.parent.mkdir(parents=True)
        exact, loss = results.get(job.run.learning_rate, (0.0, 1.0))
        held_out = {"exact_match": exact}
        keep(path, {"held_out": held_out, "held_out_loss": loss, "diverged": False})
    return grid, place


def test_the_rate_is_chosen_by_held_out_exact_match_and_then_by_loss(tmp_path: Path) -> None:
    grid, place = kept_tuning(tmp_path, {0.01: (90.0, 0.1), 0.02: (95.0, 0.4), 0.04: (95.0, 0.3)})

    rates = chosen_rates(grid, place)

    assert rates is not None
    assert rates["direct"] == 0.04


def test_no_rate_is_chosen_while_one_is_not_tried(tmp_path: Path) -> None:
    grid, place = kept_tuning(tmp_path, {0.01: (90.0, 0.1), 0.02: (95.0, 0.4)})
    [missing] = [job.run for job in grid.tune() if job.run.learning_rate == 0.02]
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
