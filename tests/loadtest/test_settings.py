"""What is asked for is checked by name, and fits the model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from loadtest.errors import BadLoad
from loadtest.server_view import Served, ServedTask
from loadtest.settings import check_made, check_shape, make_plan
from loadtest.traffic import Shape

SHAPE = Shape(10.0, 1.0, 1.0, (8, 512), (8, 512), 1.0, 5.0, 0)


def served(*limits: int, base: int = 2048) -> Served:
    tasks = tuple(ServedTask(f"t{n}", limit, 4) for n, limit in enumerate(limits))
    return Served(ServedTask("org/tiny", base, 0), tasks, 90, "1")


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("rate", 0.0, "--rate 0"),
        ("rate", math.inf, "--rate inf"),
        ("burstiness", 0.0, "--burstiness 0"),
        ("duration_seconds", math.nan, "--duration nan"),
        ("warmup_seconds", -1.0, "--warmup -1"),
        ("zipf", -0.5, "--zipf -0.5"),
        ("seed", -1, "--seed -1"),
        ("input_len", (9, 8), "--input-len 9 8"),
        ("output_len", (0, 8), "--output-len 0 8"),
    ],
)
def test_a_setting_that_makes_no_traffic_is_refused_by_its_flag(
    field: str, value: Any, flag: str
) -> None:
    with pytest.raises(BadLoad, match=flag):
        check_shape(replace(SHAPE, **{field: value}))


def test_all_tasks_are_one_run_unless_numbers_are_given() -> None:
    assert make_plan(SHAPE, (), served(2048, 2048), ()).num_tasks == (2,)
    plan = make_plan(SHAPE, (2, 0, 1, 2), served(2048, 2048), ())
    assert plan.num_tasks == (0, 1, 2)
    assert [plan.names(n) for n in plan.num_tasks] == [("org/tiny",), ("t0",), ("t0", "t1")]


def test_made_tasks_are_used_alone() -> None:
    assert make_plan(SHAPE, (), served(2048, 2048, 2048), ["t1", "t2"]).tasks == ("t1", "t2")


def test_more_tasks_than_there_are_say_how_to_make_some() -> None:
    with pytest.raises(BadLoad, match=r"--tasks 5: the server has 1 tasks .* --make-tasks 5"):
        make_plan(SHAPE, (1, 5), served(2048), ())


@pytest.mark.parametrize(
    ("asked_in", "asked_out", "limit", "got_in", "got_out"),
    [
        ((8, 512), (8, 512), 1024, (8, 512), (8, 512)),
        ((8, 512), (8, 512), 500, (8, 250), (8, 250)),
        ((8, 100), (8, 900), 500, (8, 100), (8, 400)),
        ((8, 900), (8, 100), 501, (8, 401), (8, 100)),
        ((8, 300), (8, 900), 501, (8, 250), (8, 251)),
    ],
)
def test_lengths_are_cut_to_what_fits_and_no_further(
    asked_in: tuple[int, int],
    asked_out: tuple[int, int],
    limit: int,
    got_in: tuple[int, int],
    got_out: tuple[int, int],
) -> None:
    shape = replace(SHAPE, input_len=asked_in, output_len=asked_out)

    plan = make_plan(shape, (), served(2048, limit), ())

    assert (plan.shape.input_len, plan.shape.output_len) == (got_in, got_out)
    assert bool(plan.notes) == ((got_in, got_out) != (asked_in, asked_out))


def test_only_tasks_in_use_cut_the_lengths() -> None:
    assert make_plan(SHAPE, (1,), served(1024, 100), ()).notes == ()
    assert make_plan(SHAPE, (0, 1), served(1024, base=600), ()).shape.input_len == (8, 300)


def test_lengths_that_can_not_be_cut_are_refused() -> None:
    with pytest.raises(BadLoad, match="t0 has room for 10 tokens"):
        make_plan(SHAPE, (), served(10), ())


@pytest.mark.parametrize(("count", "prefix"), [(-1, "bench"), (10_000, "bench"), (5, "x" * 59)])
def test_names_that_would_not_fit_are_refused_before_the_first_upload(
    count: int, prefix: str
) -> None:
    with pytest.raises(BadLoad):
        check_made(count, prefix)
