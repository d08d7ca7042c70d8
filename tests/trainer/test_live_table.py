"""What a person sees of a run: on a terminal, and where the output goes to a file."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from tests.trainer.synthetic_run import SyntheticRun
from trainer.live_table import LiveTable, PlainLines, number, open_display, table
from trainer.run_state import RunState, clock, sparkline


def state_after(run: SyntheticRun, num_records: int | None = None) -> RunState:
    state = RunState()
    for record in run.records()[:num_records]:
        state = state.after(record)
    return state


def drawn(state: RunState) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(table(state, "a task"))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def plain_lines(run: SyntheticRun, seconds: float = 10.0) -> list[str]:
    out = io.StringIO()
    with PlainLines("a task", Console(file=out, width=40), seconds) as lines:
        for record in run.records():
            lines.on_record(record)
    return out.getvalue().splitlines()


def test_the_table_says_what_there_is_to_know() -> None:
    run = SyntheticRun(metrics={"exact_match": 93.0}, warnings=["separator"])
    text = drawn(state_after(run, 105))
    for shown in (
        "1,000 examples to train on, 32 held out; 18,432 parameters",
        "step 93 of 200  0:19 gone  0:21 left",
        "held-out loss",
        "best 0.7622 at step 80",
        "exact match",
        "93.0",
        "0.005",
        "400",
        "warning: about separator",
        "█",
    ):
        assert shown in text
    assert "ended" not in text


def test_the_table_of_a_run_that_ended_says_why() -> None:
    text = drawn(state_after(SyntheticRun(end="no improvement")))
    assert "ended: no improvement at step 200 after 0:40; best held-out loss" in text
    assert "left" not in text


def test_the_table_of_a_run_that_has_not_begun_can_be_drawn() -> None:
    assert "step 0 of 0" in drawn(RunState())


def test_a_terminal_gets_the_table_and_a_file_gets_lines() -> None:
    assert isinstance(
        open_display("x", Console(file=io.StringIO(), force_terminal=True)), LiveTable
    )
    assert isinstance(open_display("x", Console(file=io.StringIO())), PlainLines)


def test_what_the_table_last_showed_stays() -> None:
    out = io.StringIO()
    with LiveTable("a task", Console(file=out, force_terminal=True, width=100)) as shown:
        for record in SyntheticRun().records():
            shown.on_record(record)
    assert "ended: finished" in out.getvalue()


def test_lines_have_no_control_characters_and_are_not_wrapped() -> None:
    lines = plain_lines(SyntheticRun(metrics={"bleu": 41.5}))
    assert all(line.isprintable() for line in lines)
    assert "step 20/200  held-out loss 4.3078  bleu 41.5  (best 4.3078 at step 20)" in lines


def test_between_evaluations_lines_come_at_intervals() -> None:
    steps = [line for line in plain_lines(SyntheticRun(), 10.0) if "gradient norm" in line]
    assert len(steps) == 4  # of 200 steps in 40 seconds
    assert all("tokens/s" in line for line in steps)
    assert "left" in steps[-1]


def test_warnings_and_the_end_are_lines_too() -> None:
    lines = plain_lines(SyntheticRun(warnings=["separator"]))
    assert "warning: about separator" in lines
    assert lines[-1].startswith("ended: finished at step 200 after 0:40")


# ---- pieces ----------------------------------------------------------------------------------------


def test_the_time_left_follows_the_pace_of_the_last_steps() -> None:
    state = RunState().after(SyntheticRun().records()[0])
    for step in range(1, 101):
        seconds = step * (0.1 if step <= 50 else 0.4)
        state = state.after({"kind": "step", "step": step, "loss": 1.0, "seconds": seconds})
    assert state.seconds_left == pytest.approx(100 * 0.4)


def test_a_resumed_run_goes_by_its_own_pace() -> None:
    begin = SyntheticRun().records()[0]
    state = state_after(SyntheticRun(), 100).after({**begin, "step": 90})
    assert (state.step, state.seconds_left) == (90, None)


def test_the_best_is_never_a_loss_that_is_no_number() -> None:
    state = RunState()
    for step, loss in enumerate([3.0, None, 2.0, 2.5]):
        state = state.after({"kind": "held_out", "step": step, "loss": loss})
    assert state.best == (2, 2.0)


@pytest.mark.parametrize(
    ("values", "width", "shown"),
    [
        ((), 10, ""),
        ((1.0, 2.0), 0, ""),
        ((1.0, 8.0), 10, "▁█"),
        ((8.0, 8.0, 1.0, 1.0), 2, "█▁"),
        ((2.0, 2.0), 2, "▁▁"),
        ((1.0, math.nan, 8.0), 3, "▁ █"),
        ((math.nan,), 3, " "),
    ],
)
def test_a_sparkline_goes_from_the_lowest_to_the_highest(
    values: tuple[float, ...], width: int, shown: str
) -> None:
    assert sparkline(values, width) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(7, "0:07"), (754.4, "12:34"), (11_554, "3:12:34"), (-1, "0:00")]
)
def test_times_read_like_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (math.nan, "not a number"),
        (math.inf, "infinite"),
        (0.0, "0.0000"),
        (0.12345, "0.1235"),
        (0.00012, "0.00012"),
        (12345.6, "1.23e+04"),
    ],
)
def test_numbers_are_short_and_say_when_they_are_none(value: float | None, shown: str) -> None:
    assert number(value) == shown
