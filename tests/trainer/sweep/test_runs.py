"""Runs of a sweep: ordinary ones, none twice, none that ends the others, all on the same examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefix_store.artifact import decode, digest_of
from tests.trainer.runs import small_run, write_examples
from tests.trainer.sweep.sweeps import Watcher, small_sweep
from trainer import base as base_module
from trainer import session
from trainer.config import TrainConfig
from trainer.data import read_examples
from trainer.errors import BadData, BadSetting, CannotResume, RunExists
from trainer.held_out_loss import mean_loss
from trainer.loss import next_token_loss
from trainer.prefix_cache import KeyValues
from trainer.records import read_records
from trainer.run_folder import RunFolder
from trainer.session import Attachments
from trainer.sweep import plan
from trainer.sweep.runs import SweepResult, sweep

pytestmark = pytest.mark.usefixtures("undrawn")


def key_values(path: Path) -> KeyValues:
    """Of a stored prefix."""
    data = path.read_bytes()
    prefix = decode(data, digest_of(data))
    return KeyValues(prefix.keys, prefix.values)


def folders(result: SweepResult) -> list[Path]:
    return sorted((result.folder / "runs").iterdir())


def prefixes(result: SweepResult) -> dict[str, bytes]:
    return {path.name: RunFolder(path).prefix.read_bytes() for path in folders(result)}


def stored(result: SweepResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.folder / "sweep.json").read_text())
    return found


def test_each_run_is_the_run_that_it_would_be_alone(tmp_path: Path) -> None:
    """Sharing base and examples changes no byte, whatever ran before."""
    result = sweep([small_sweep(tmp_path, encoder=["direct", "mlp"], seed=[0, 7])])

    assert len(folders(result)) == 8
    for number, path in enumerate(folders(result)):
        config = TrainConfig(**RunFolder(path).read_config())
        alone = session.train(config.model_copy(update={"output": tmp_path / f"alone-{number}"}))
        assert alone.prefix.read_bytes() == RunFolder(path).prefix.read_bytes()
        assert read_records(RunFolder(path).log)[-1]["kind"] == "end"
    assert result.prefix in [RunFolder(path).prefix for path in folders(result)]


def test_the_base_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str | None] = []
    load = base_module.load_base

    def counted(source: str | None, **settings: Any) -> Any:
        loaded.append(source)
        return load(source, **settings)

    monkeypatch.setattr(session, "load_base", counted)
    sweep([small_sweep(tmp_path, seed=[0, 1])])
    assert len(loaded) == 1


def test_scores_are_those_of_the_stored_prefix_on_the_held_out_examples_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def watched(path: Path, *rest: Any) -> Any:
        read.append(path)
        return read_examples(path, *rest)

    monkeypatch.setattr(session, "read_examples", watched)
    config = small_sweep(tmp_path)

    result = sweep([config])

    assert set(read) == {config.data}, "no other examples are looked at"
    material = session.gather(next(config.runs()))
    for outcome in (o for s in result.summaries for o in s.outcomes):
        log = read_records(result.folder / "runs" / outcome.name / "log.jsonl")
        end = next(record for record in log if record["kind"] == "end")
        assert outcome.scores["loss"].value == pytest.approx(end["best_loss"], abs=1e-6)
        assert outcome.best_step == end["best_step"]
        kept = key_values(RunFolder(result.folder / "runs" / outcome.name).prefix)
        again = mean_loss(material.base, kept, material.held_out, 4, next_token_loss)
        assert outcome.scores["loss"].value == pytest.approx(again, abs=1e-6)
        assert outcome.scores["loss"].standard_error > 0


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    first = sweep([small_sweep(tmp_path)])
    times = [(path / "log.jsonl").stat().st_mtime_ns for path in folders(first)]
    watcher = Watcher()

    again = sweep([small_sweep(tmp_path)], watcher)

    assert watcher.records == []
    assert [outcome.state for outcome in watcher.outcomes] == ["finished", "finished"]
    assert again.summaries == first.summaries
    assert again.pick == first.pick
    assert [(path / "log.jsonl").stat().st_mtime_ns for path in folders(again)] == times


def test_more_lengths_and_seeds_may_be_added(tmp_path: Path) -> None:
    sweep([small_sweep(tmp_path)])
    watcher = Watcher()

    more = sweep([small_sweep(tmp_path, num_virtual_tokens=[2, 4, 6], seed=[0, 1])], watcher)

    assert len(watcher.of("begin")) == 4
    assert [summary.setting.num_virtual_tokens for summary in more.summaries] == [2, 4, 6]
    assert all(summary.num_finished == 2 for summary in more.summaries)


def test_another_metric_is_measured_without_training_again(tmp_path: Path) -> None:
    sweep([small_sweep(tmp_path)])
    watcher = Watcher()

    result = sweep([small_sweep(tmp_path, metric=["token_f1"], pick_by="token_f1")], watcher)

    assert watcher.records == []
    assert all(set(summary.scores) == {"loss", "token_f1"} for summary in result.summaries)
    assert stored(result)["pick"]["by"] == "token_f1"


def test_a_prefix_that_is_another_now_is_measured_again(tmp_path: Path) -> None:
    first = sweep([small_sweep(tmp_path)])
    short, long = folders(first)
    RunFolder(short).prefix.write_bytes(RunFolder(long).prefix.read_bytes())

    again = sweep([small_sweep(tmp_path)])

    shorter, longer = again.summaries
    assert shorter.scores == longer.scores
    assert shorter.scores != first.summaries[0].scores


@pytest.mark.parametrize("after", [0, 3, 8])
def test_interrupted_and_called_again_equals_uninterrupted(tmp_path: Path, after: int) -> None:
    whole = sweep([small_sweep(tmp_path, output=tmp_path / "whole")])
    watcher = Watcher()

    part = sweep([small_sweep(tmp_path)], watcher, lambda: len(watcher.of("step")) >= after)

    assert part.interrupted
    assert part.pick is None
    assert len(watcher.of("step")) == after
    assert stored(part)["pick"] is None
    rest = Watcher()
    done = sweep([small_sweep(tmp_path)], rest)
    assert not done.interrupted
    assert len(rest.of("step")) == 12 - after
    assert prefixes(done) == prefixes(whole)
    assert done.pick is not None
    assert whole.pick is not None
    assert done.pick.run.scores == whole.pick.run.scores


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    config = small_sweep(tmp_path)
    watcher = Watcher()
    sweep([config], watcher, lambda: True)
    folder = config.output / "runs" / watcher.begun[0]
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "log.jsonl").write_text('{"kind": "beg')

    result = sweep([config])

    assert [summary.complete for summary in result.summaries] == [True, True]


@pytest.mark.parametrize("warmup", [0.9, 0.0], ids=["on the way up", "at once"])
def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path, warmup: float) -> None:
    config = small_sweep(
        tmp_path, learning_rate=[0.02, 1e38], num_virtual_tokens=[2], warmup_fraction=warmup
    )

    result = sweep([config])

    good, bad = sorted(result.summaries, key=lambda summary: summary.setting.learning_rate)
    assert good.complete
    [failed] = bad.outcomes
    assert failed.state == "failed"
    assert "Diverged: step" in (failed.error or "")
    assert result.pick is not None
    assert result.pick.picked == good
    assert stored(result)["runs"][1]["error"] == failed.error


def test_a_failed_run_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = session.train

    def fails(config: TrainConfig, *rest: Any) -> Any:
        if config.num_virtual_tokens == 2:
            raise BadData("the moon is full")
        return train(config, *rest)

    monkeypatch.setattr(session, "train", fails)
    first = sweep([small_sweep(tmp_path)])
    assert [summary.complete for summary in first.summaries] == [False, True]
    monkeypatch.undo()

    again = sweep([small_sweep(tmp_path)])

    assert all(summary.complete for summary in again.summaries)


def test_a_damaged_run_fails_alone(tmp_path: Path) -> None:
    first = sweep([small_sweep(tmp_path)])
    checkpoint = RunFolder(folders(first)[0]).checkpoint
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])

    again = sweep([small_sweep(tmp_path)])

    assert [outcome.state for s in again.summaries for outcome in s.outcomes] == [
        "failed",
        "finished",
    ]


def test_all_runs_have_the_examples_that_fit_behind_the_longest_prefix(tmp_path: Path) -> None:
    """Else the short prefixes would be judged on other, longer examples."""
    config = small_sweep(tmp_path, num_virtual_tokens=[2, 2040])
    lines = [
        json.dumps({"prompt": "the quick brown fox " * 8, "completion": f"fox {number}"})
        for number in range(3)
    ]
    with config.data.open("a") as file:
        file.write("\n".join(lines) + "\n")
    limit = session.open_base(config).spec.position_limit
    assert limit is not None
    lengths = (2, limit - 20)
    watcher = Watcher()

    sweep([config.model_copy(update={"num_virtual_tokens": lengths, "num_steps": 1})], watcher)

    begun = watcher.of("begin")
    assert [record["num_virtual_tokens"] for record in begun] == list(lengths)
    assert begun[0]["num_training"] == begun[1]["num_training"]
    assert begun[0]["held_out_tokens"] == begun[1]["held_out_tokens"]
    assert begun[0]["num_training"] + begun[0]["num_held_out"] < 43
    left_out = [r for r in watcher.of("warning") if r["code"] == "too_long"]
    assert left_out, "and the user is told"


def test_a_run_that_can_not_be_is_found_before_the_first_begins(tmp_path: Path) -> None:
    config = small_sweep(tmp_path, num_virtual_tokens=[2, 900_000])

    with pytest.raises(BadSetting, match="900000, but the base has"):
        sweep([config])

    assert not config.output.exists()


def test_another_sweep_in_the_folder_is_refused(tmp_path: Path) -> None:
    sweep([small_sweep(tmp_path)])

    with pytest.raises(RunExists, match=r"other settings \((batch_size|num_steps), "):
        sweep([small_sweep(tmp_path, num_steps=9, batch_size=3)])


def test_other_data_under_the_same_name_is_refused(tmp_path: Path) -> None:
    config = small_sweep(tmp_path)
    sweep([config])
    write_examples(config.data, 40, seed=5)

    with pytest.raises(CannotResume, match="its data or the weights"):
        sweep([config])


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    session.train(small_run(tmp_path, num_steps=1, output=tmp_path / "sweep"), Attachments())
    before = sorted(path.name for path in (tmp_path / "sweep").iterdir())

    with pytest.raises(RunExists, match="holds no sweep"):
        sweep([small_sweep(tmp_path)])

    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == before


def test_a_damaged_sweep_file_is_named(tmp_path: Path) -> None:
    config = small_sweep(tmp_path)
    sweep([config], None, lambda: True)
    (config.output / "sweep.json").write_text('{"runs": []}')

    with pytest.raises(CannotResume, match=r"sweep\.json is no sweep"):
        sweep([config])


def test_runs_are_selected_by_a_metric_where_that_is_asked_for(tmp_path: Path) -> None:
    recorder = Watcher()
    sweep([small_sweep(tmp_path, select_by="token_f1", num_virtual_tokens=[2])], recorder)
    assert all("token_f1" in record for record in recorder.of("held_out"))


def test_names_of_runs_say_what_differs(tmp_path: Path) -> None:
    config = small_sweep(tmp_path, init=["random"], init_text=["the fox", "the dog"], seed=[0, 1])
    made = plan.make_plan([config], tmp_path)
    assert len({run.name for run in made.runs}) == len(made.runs) == 12
    assert made.runs[0].name == "P2-direct-random-lr0.02-s0"
