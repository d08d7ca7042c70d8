"""A pool, a plan and queries for tests of the decode kernels: random content in random blocks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.work_tables import TableShape, WorkTables
from server.model.attention.triton import pack_plan, shape_for
from server.model.attention.work_items import DecodeRow, WorkPlan, plan_work
from tests.kernel_support import KERNEL_DEVICE


@dataclass(frozen=True)
class Shape:
    """Heads and head dims; `block_size` tokens in a block."""

    Hq: int
    H: int
    Dk: int
    Dv: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Row:
    """`own` tokens behind `P` of the task's prefix. The queries follow from all of it."""

    task: str
    P: int
    own: int


class DecodeCase:
    """Content depends on the row or the task alone, so that a row can be met again elsewhere."""

    def __init__(self, rows: Sequence[Row], shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        bs = shape.block_size
        num_blocks = 1 + sum(-(-r.P // bs) + -(-r.own // bs) for r in rows)
        self._free = list(range(1, num_blocks))
        random.Random(seed).shuffle(self._free)
        # What nobody wrote is NaN and must not be read, padding included: block 0 is not touched either.
        self.keys = torch.full((num_blocks * bs, shape.H, shape.Dk), math.nan, dtype=shape.dtype)
        self.values = torch.full((num_blocks * bs, shape.H, shape.Dv), math.nan, dtype=shape.dtype)
        self._prefixes: dict[tuple[str, int], tuple[int, ...]] = {}
        self.rows = [self._lay(token, row) for token, row in enumerate(rows)]
        self.queries = torch.stack([_draw(f"q{r}", shape.Hq, shape.Dk) for r in rows])
        self.queries = self.queries.to(KERNEL_DEVICE, shape.dtype)
        self.keys, self.values = self.keys.to(KERNEL_DEVICE), self.values.to(KERNEL_DEVICE)

    def _lay(self, token: int, row: Row) -> DecodeRow:
        key = (row.task, row.P)
        if key not in self._prefixes:
            self._prefixes[key] = self._write(f"prefix{key}", row.P)
        own = self._write(f"own{row}", row.own)
        return DecodeRow(token, row.P + row.own, row.P, self._prefixes[key], own)

    def _write(self, name: str, length: int) -> tuple[int, ...]:
        bs = self.shape.block_size
        blocks = tuple(self._free.pop() for _ in range(-(-length // bs)))
        for t in range(length):
            slot = blocks[t // bs] * bs + t % bs
            self.keys[slot] = _draw(f"k{name}{t}", self.shape.H, self.shape.Dk)
            self.values[slot] = _draw(f"v{name}{t}", self.shape.H, self.shape.Dv)
        return blocks

    def plan(self, rows_per_item: int, window: int | None, *, grouped: bool = True) -> WorkPlan:
        plan = plan_work(self.rows, rows_per_item=rows_per_item, window=window, grouped=grouped)
        plan.check_invariants(rows_per_item, window)
        return plan


def tables_of(plan: WorkPlan, shape: TableShape | None = None) -> WorkTables:
    shape = shape or shape_for(plan)
    return WorkTables.of(pack_plan(plan, shape).to(KERNEL_DEVICE), shape)


def _draw(name: str, heads: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()) % (2**61 - 1))
    return torch.randn(heads, dim, generator=generator)
