"""The work of a decode step, against a twin that asks of every single key of every row which item reads it."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from server.model.attention.work_items import (
    CHUNK,
    MIN_SHARED_PREFIX,
    DecodeRow,
    WorkItem,
    WorkPlan,
    plan_work,
)

BLOCK_SIZE = 16


def make_rows(lengths: list[tuple[int, int, int]]) -> list[DecodeRow]:
    """Rows of (task, prefix_len, own_len); rows of one task have one prefix, blocks are otherwise their own."""
    free = iter(range(1, 10_000_000))
    prefixes: dict[int, tuple[int, ...]] = {}
    rows = []
    for token, (task, prefix_len, own_len) in enumerate(lengths):
        if task not in prefixes:
            prefixes[task] = tuple(next(free) for _ in range(-(-prefix_len // BLOCK_SIZE)))
        own = tuple(next(free) for _ in range(-(-own_len // BLOCK_SIZE)))
        rows.append(DecodeRow(token, prefix_len + own_len, prefix_len, prefixes[task], own))
    return rows


def reads(plan: WorkPlan) -> Counter[tuple[int, int]]:
    """How often each (token of the pack, key) is read, from the items alone."""
    return Counter(
        (plan.rows[r].token, t)
        for item in plan.items
        for r in range(item.first_row, item.first_row + item.num_rows)
        for t in range(item.start, min(item.stop, plan.rows[r].kv_len))
    )


@pytest.mark.parametrize("window", [None, 1, 24, 256, 700])
@pytest.mark.parametrize("grouped", [True, False])
def test_every_key_that_a_row_sees_is_read_once(window: int | None, grouped: bool) -> None:
    rng = random.Random(f"{window}{grouped}")
    for _ in range(30):
        tasks = {i: rng.choice([0, 1, 31, 32, 37, 128, 256, 300, 600]) for i in range(5)}
        lengths = [
            (task, tasks[task], rng.choice([1, 2, 255, 256, 257, rng.randint(1, 900)]))
            for task in rng.choices(range(5), k=rng.randint(1, 20))
        ]
        rows = make_rows(lengths)
        together = rng.choice([1, 4, 8])

        plan = plan_work(rows, rows_per_item=together, window=window, grouped=grouped)

        plan.check_invariants(together, window)
        assert sorted(row.token for row in plan.rows) == list(range(len(rows)))
        found = reads(plan)
        assert set(found.values()) == {1}
        for row in rows:
            lowest = 0 if window is None else max(0, row.kv_len - window)
            read = {t for token, t in found if token == row.token}
            assert read >= set(range(lowest, row.kv_len))
            assert min(read) > lowest - CHUNK, "a whole chunk outside of the window"


def test_a_shared_prefix_is_read_once_for_as_many_rows_as_an_item_holds() -> None:
    rows = make_rows([(0, 300, 5), (1, 300, 5), *[(0, 300, 5)] * 9])

    plan = plan_work(rows, rows_per_item=8, window=None)

    shared = [(item.num_rows, item.start, item.stop) for item in plan.items if item.start < 300]
    assert sorted(shared) == [
        (1, 0, 256),
        (1, 256, 300),
        (2, 0, 256),
        (2, 256, 300),
        (8, 0, 256),
        (8, 256, 300),
    ]


def test_a_row_is_cut_the_same_alone_and_among_others() -> None:
    """Where sums begin and end decides their bits; who else is there must not."""
    rng = random.Random(7)
    tasks = {i: rng.choice([0, 5, MIN_SHARED_PREFIX, 100, 300]) for i in range(4)}
    lengths = [(i := rng.randrange(4), tasks[i], rng.randint(1, 600)) for _ in range(30)]
    rows = make_rows(lengths)
    for window in (None, 100):
        together = plan_work(rows, rows_per_item=8, window=window)
        for row in rows:
            alone = plan_work([row], rows_per_item=8, window=window)
            assert cuts(together, row) == cuts(alone, row)


def cuts(plan: WorkPlan, row: DecodeRow) -> list[tuple[int, int, int]]:
    r = plan.rows.index(row)
    return sorted(
        (item.part, item.start, item.stop)
        for item in plan.items
        if item.first_row <= r < item.first_row + item.num_rows
    )


def test_a_step_that_only_lengthens_its_rows_has_the_items_of_the_last() -> None:
    """So that a graph which replays needs new lengths only, until a row begins another chunk."""
    before = make_rows([(0, 40, 10), (0, 40, 100), (1, 7, 200)])
    after = [DecodeRow(r.token, r.kv_len + 9, *_rest(r)) for r in before]

    plans = [plan_work(rows, rows_per_item=8, window=None) for rows in (before, after)]

    assert plans[0].items == plans[1].items
    assert plans[0].num_parts == plans[1].num_parts


def _rest(row: DecodeRow) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return row.prefix_len, row.prefix_block_ids, row.own_block_ids


def broken(plan: WorkPlan, how: str) -> WorkPlan:
    first = plan.items[0]
    items = {
        "an item lost": plan.items[1:],
        "an item twice": (*plan.items, first),
        "a part number taken": (first._replace(part=1), *plan.items[1:]),
        "a key skipped": (first._replace(start=1), *plan.items[1:]),
        "more than the prefix shared": (first._replace(stop=CHUNK), *plan.items[1:]),
        "a stranger's prefix": (first._replace(num_rows=3), *plan.items[1:]),
        "a padding item": (*plan.items, WorkItem(0, 0, 0, 0, 0)),
    }
    return WorkPlan(plan.rows, items[how], plan.num_parts)


@pytest.mark.parametrize(
    "how",
    [
        "an item lost",
        "an item twice",
        "a part number taken",
        "a key skipped",
        "more than the prefix shared",
        "a stranger's prefix",
        "a padding item",
    ],
)
def test_the_invariants_notice(how: str) -> None:
    plan = plan_work(make_rows([(0, 40, 5), (0, 40, 90), (1, 50, 5)]), rows_per_item=8, window=None)
    plan.check_invariants(8, None)

    with pytest.raises(AssertionError):
        broken(plan, how).check_invariants(8, None)
