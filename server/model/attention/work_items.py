"""What a decode step has to read, cut into pieces for the kernels: the list of work items.

Pure bookkeeping, without tensors; runs on the engine thread, called once per step and kind of layer by the
triton backend. A row's keys are cut into chunks of `CHUNK` tokens. How, depends on the row and the layer
alone, never on the batch: that, and not the grouping, decides in which order its numbers are added up.

* A prefix of `MIN_SHARED_PREFIX` tokens or more is cut by itself, and the row's own tokens by themselves. The
  prefix's chunks are then the same for all its rows, and rows of one prefix share an item.
* A shorter one is cut together with the row's own tokens: reading it again costs less than merging one more
  partial result.
* A layer with a sliding window sees another part of the prefix in each row, so nothing is shared there. Its
  chunks begin at multiples of `CHUNK`; those that lie before the window are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

CHUNK: Final = 256  # tokens; a multiple of the kernels' tiles
MIN_SHARED_PREFIX: Final = (
    32  # tokens; one more partial result costs as much traffic as 4 to 14 tokens
)


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A row that decodes one token: `token` in the pack, the last of `kv_len` keys, the first P of them a prefix."""

    token: int
    kv_len: int
    prefix_len: int
    prefix_block_ids: tuple[int, ...]
    own_block_ids: tuple[int, ...]


class WorkItem(NamedTuple):
    """Keys `start`..`stop - 1` (or as far as the row goes) of some neighbouring rows, their partial result `part`."""

    first_row: int
    num_rows: int
    part: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """`rows` as the items number them: those of one prefix stand side by side."""

    rows: tuple[DecodeRow, ...]
    items: tuple[WorkItem, ...]
    num_parts: tuple[int, ...]  # of each row

    @property
    def part_offsets(self) -> list[int]:
        """Where each row's partial results begin, and where the last row's end."""
        return list(itertools.accumulate(self.num_parts, initial=0))

    def check_invariants(self, rows_per_item: int, window: int | None) -> None:
        """Every key that a row sees is in one of its items, and in one only; parts are numbered through."""
        parts: list[list[WorkItem]] = [[] for _ in self.rows]
        for item in self.items:
            assert 1 <= item.num_rows <= rows_per_item
            mates = range(item.first_row, item.first_row + item.num_rows)
            for r in mates:
                parts[r].append(item)
            shared = self.rows[item.first_row]
            if item.num_rows > 1:
                assert window is None
                assert item.stop <= shared.prefix_len, "rows share more than their prefix"
                assert len({self.rows[r].prefix_block_ids for r in mates}) == 1
                assert len({self.rows[r].prefix_len for r in mates}) == 1
        for row, count, mine in zip(self.rows, self.num_parts, parts, strict=True):
            assert sorted(item.part for item in mine) == list(range(count))
            lowest = 0 if window is None else max(0, row.kv_len - window)
            keys = [
                t
                for item in sorted(mine, key=lambda item: item.part)
                for t in range(item.start, min(item.stop, row.kv_len))
            ]
            assert keys == list(range(keys[0], row.kv_len)), "a key is missing, or read twice"
            assert keys[0] <= lowest < keys[0] + CHUNK


def plan_work(
    rows: Sequence[DecodeRow], *, rows_per_item: int, window: int | None, grouped: bool = True
) -> WorkPlan:
    """The items of these rows. `grouped` False reads each prefix once per row, to the same bits."""
    if window is not None:
        return _plan_alone(rows, window)
    ordered = sorted(rows, key=_identity)
    items: list[WorkItem] = []
    num_parts = [0] * len(ordered)
    for _, found in itertools.groupby(range(len(ordered)), lambda r: _identity(ordered[r])):
        mates = list(found)
        prefix_len = ordered[mates[0]].prefix_len
        split = prefix_len if prefix_len >= MIN_SHARED_PREFIX else 0
        shared = range(0, split, CHUNK)
        together = rows_per_item if grouped else 1
        for part, start in enumerate(shared):
            stop = min(start + CHUNK, split)
            for at in range(0, len(mates), together):
                count = min(together, len(mates) - at)
                items.append(WorkItem(mates[at], count, part, start, stop))
        for r in mates:
            own = _cut(r, split, ordered[r].kv_len, len(shared))
            items.extend(own)
            num_parts[r] = len(shared) + len(own)
    return WorkPlan(tuple(ordered), tuple(items), tuple(num_parts))


def _identity(row: DecodeRow) -> int:
    """Of its prefix: blocks belong to one prefix, so the first of them tells; 0 if there is none."""
    return row.prefix_block_ids[0] if row.prefix_block_ids else 0


def _plan_alone(rows: Sequence[DecodeRow], window: int) -> WorkPlan:
    items: list[WorkItem] = []
    num_parts = []
    for r, row in enumerate(rows):
        first = max(0, row.kv_len - window) // CHUNK * CHUNK
        own = _cut(r, first, row.kv_len, 0)
        items.extend(own)
        num_parts.append(len(own))
    return WorkPlan(tuple(rows), tuple(items), tuple(num_parts))


def _cut(row: int, first: int, end: int, first_part: int) -> list[WorkItem]:
    """Keys `first`..`end - 1` of one row. A last chunk's `stop` is not the row's end: the row will grow into it."""
    return [
        WorkItem(row, 1, part, start, start + CHUNK)
        for part, start in enumerate(range(first, end, CHUNK), first_part)
    ]
