"""What a run's records become before anything is drawn or judged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.trainer.synthetic_run import SyntheticRun
from trainer.history import History, per_layer, points, smoothed
from trainer.records import MalformedLog, Record, read_records


def step(number: int, loss: float | None) -> Record:
    return {"kind": "step", "step": number, "loss": loss}


def test_what_a_resumed_run_did_twice_counts_once() -> None:
    records = [step(1, 5.0), step(2, 4.0), step(3, 3.0), step(2, 4.5), step(3, 3.5)]
    assert History.of(records).train_loss() == ((1, 5.0), (2, 4.5), (3, 3.5))


def test_a_run_that_went_on_has_not_ended() -> None:
    end: Record = {"kind": "end", "reason": "diverged"}
    assert History.of([step(1, 1.0), end]).end == end
    assert History.of([step(1, 1.0), end, step(2, 1.0)]).end is None


def test_the_first_record_is_the_one_of_the_whole_run() -> None:
    first, again = ({"kind": "begin", "step": 0}, {"kind": "begin", "step": 9})
    assert History.of([first, again]).begin == first


def test_kinds_and_fields_that_are_not_known_are_passed_over() -> None:
    records: list[Record] = [
        {"kind": "weather"},
        {"kind": "step", "step": 1, "loss": 2.0, "mood": "good"},
    ]
    assert History.of(records).num_steps == 1


def test_metrics_are_what_is_measured_beside_the_loss() -> None:
    record = {
        "kind": "held_out",
        "step": 3,
        "loss": 1.0,
        "loss_other_prompt": 2.0,
        "bleu": 40,
        "note": "x",
    }
    assert History.of([record]).metrics() == {"bleu": ((3, 40.0),)}


def test_the_best_step_is_the_one_with_the_lowest_loss_that_is_a_number() -> None:
    losses = [3.0, math.nan, 2.0, 2.5]
    records = [{"kind": "held_out", "step": i, "loss": loss} for i, loss in enumerate(losses)]
    assert History.of(records).best() == (2, 2.0)
    assert History.of([]).best() is None


def test_null_is_not_a_number() -> None:
    [(_, value)] = points([step(1, None)], "loss")
    assert math.isnan(value)
    assert per_layer({"kind": "prefix"}, "key_norms") == ()


def test_smoothing_keeps_the_mean_of_what_came_before() -> None:
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


# ---- the log ---------------------------------------------------------------------------------------


def test_a_log_gives_back_its_records(tmp_path: Path) -> None:
    records = SyntheticRun().records()
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_records(log) == records


def test_a_line_that_a_killed_run_did_not_finish_is_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    assert [record["step"] for record in read_records(log)] == [1]


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": 1}', '{"kind": 3}'])
def test_a_line_that_is_no_record_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind": "step", "step": 1}\n' + line + "\n")
    with pytest.raises(MalformedLog, match="line 2"):
        read_records(log)


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "step"}',
        '{"kind": "step", "step": "a", "loss": 1}',
        '{"kind": "held_out", "step": true}',
        '{"kind": "prefix", "step": null}',
        '{"kind": "end"}',
        '{"kind": "end", "reason": 3}',
    ],
)
def test_a_record_without_what_all_readers_need_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"kind": "later", "unknown": 1}}\n{line}\n')

    with pytest.raises(MalformedLog, match=r"line 2: expected .* in a record of kind"):
        read_records(path)


def test_a_log_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(MalformedLog, match=r"none\.jsonl: No such file"):
        read_records(tmp_path / "none.jsonl")
