"""The decode kernels against the torch lines that they must equal, and a row's bits wherever it stands."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel_support import KERNEL_DEVICE, needs_gpu, needs_triton

pytest.importorskip("triton", reason="needs the package triton: make test-kernels")

from server.kernels.decode_partials import (
    decode_partials,
    decode_partials_in_torch,
    rows_per_item,
)
from server.kernels.merge_partials import merge_partials, merge_partials_in_torch
from server.kernels.work_tables import TableShape, WorkTables
from server.model.attention.triton import shape_for
from tests.server.kernels.decode_case import DecodeCase, Row, Shape, tables_of

pytestmark = needs_triton

SHAPES = [
    Shape(Hq=7, H=1, Dk=32, Dv=32),
    Shape(Hq=14, H=2, Dk=16, Dv=16),
    Shape(Hq=2, H=2, Dk=80, Dv=80),
    Shape(Hq=8, H=1, Dk=256, Dv=256),
    Shape(Hq=6, H=3, Dk=24, Dv=8, block_size=4),
    Shape(Hq=40, H=1, Dk=16, Dv=16),
    Shape(Hq=8, H=2, Dk=64, Dv=64, dtype=torch.float16),
]
# A prefix that is too short to share, one of no whole block, one of many rows, one of two chunks; a row alone.
MIXED = [
    Row("one", 1, 3),
    Row("thirty-seven", 37, 1),
    Row("one", 1, 40),
    Row("thirty-seven", 37, 260),
    Row("long", 300, 17),
    Row("none", 0, 20),
    Row("long", 300, 2),
    *(Row("many", 128, n) for n in range(1, 6)),
]
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 40},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "both": {"window": 300, "softcap": 2.0},
}


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 4e-3


def settings(shape: Shape, feature: str) -> dict[str, Any]:
    return {"block_size": shape.block_size, "scale": shape.Dk**-0.5, **FEATURES[feature]}


def attend(
    case: DecodeCase,
    feature: str,
    *,
    grouped: bool = True,
    sinks: Tensor | None = None,
    room: TableShape | None = None,
) -> Tensor:
    """Both kernels [T, Hq, Dv], in the rows' order."""
    group = case.shape.Hq // case.shape.H
    plan = case.plan(rows_per_item(group), FEATURES[feature].get("window"), grouped=grouped)
    tables = tables_of(plan, room)
    partial = decode_partials(
        case.queries, case.keys, case.values, tables, **settings(case.shape, feature)
    )
    out = torch.full((len(case.rows), case.shape.Hq, case.shape.Dv), math.nan)
    out = out.to(KERNEL_DEVICE, case.shape.dtype)
    merge_partials(*partial, tables, out, sinks=sinks)
    assert bool(torch.isfinite(out).all())
    return out


@pytest.mark.parametrize(
    ("shape", "feature"),
    [*itertools.product(SHAPES[:1], FEATURES), *itertools.product(SHAPES[1:], ["plain", "both"])],
    ids=str,
)
def test_partial_results_equal_the_torch_line(shape: Shape, feature: str) -> None:
    case = DecodeCase(MIXED, shape)
    plan = case.plan(rows_per_item(shape.Hq // shape.H), FEATURES[feature].get("window"))
    tables = tables_of(plan)

    out, lse = decode_partials(
        case.queries, case.keys, case.values, tables, **settings(shape, feature)
    )

    expected_out, expected_lse = decode_partials_in_torch(
        case.queries, case.keys, case.values, tables, **settings(shape, feature)
    )
    used, bound = sum(plan.num_parts), tolerance(shape.dtype)
    torch.testing.assert_close(lse[:used], expected_lse[:used], rtol=bound, atol=bound)
    torch.testing.assert_close(out[:used], expected_out[:used], rtol=bound, atol=bound)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("num_parts", [[1], [2, 9, 1], [8, 17, 3, 1]], ids=str)
def test_merged_results_equal_the_torch_line(num_parts: list[int], with_sinks: bool) -> None:
    num_heads, head_dim, n = 7, 24, sum(num_parts)
    generator = torch.Generator().manual_seed(n)
    out = torch.randn(n, num_heads, head_dim, generator=generator).to(KERNEL_DEVICE)
    lse = (torch.randn(n, num_heads, generator=generator) * 20).to(KERNEL_DEVICE)
    lse[0, 0] = lse[-1, 1] = 300.0  # far from the others: exponentials must not overflow
    if n > 1:
        lse[1, 2] = -math.inf  # a chunk of which nothing is seen
    sinks = torch.linspace(-30, 30, num_heads).to(KERNEL_DEVICE) if with_sinks else None
    tables = _tables(num_parts)

    ours, expected = torch.zeros(2, len(num_parts) + 1, num_heads, head_dim).to(KERNEL_DEVICE)
    merge_partials(out, lse, tables, ours, sinks=sinks)
    merge_partials_in_torch(out, lse, tables, expected, sinks=sinks)

    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert not bool(ours[0].any()), "nobody's token was written"


def _tables(num_parts: list[int]) -> WorkTables:
    """Of rows whose tokens are 1, 2, ..., without items."""
    shape = TableShape(len(num_parts) + 2, 1, sum(num_parts), 1)
    offsets = [0, *itertools.accumulate(num_parts)]
    words = torch.zeros(shape.buffer_len, dtype=torch.int32, device=KERNEL_DEVICE)
    tables = WorkTables.of(words, shape)
    tables.tokens[: len(num_parts)] = torch.arange(1, len(num_parts) + 1)
    tables.part_offsets[:] = torch.tensor([*offsets, offsets[-1], offsets[-1]])
    return tables


@pytest.mark.parametrize("feature", ["plain", "softcap"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4], SHAPES[6]], ids=str)
def test_grouped_equals_ungrouped_to_the_bit(shape: Shape, feature: str) -> None:
    sinks = torch.linspace(-1, 2, shape.Hq).to(KERNEL_DEVICE)
    case = DecodeCase(MIXED, shape)
    plans = [case.plan(rows_per_item(shape.Hq // shape.H), None, grouped=g) for g in (True, False)]
    assert len(plans[0].items) < len(plans[1].items), "nothing was grouped"

    grouped, ungrouped = (attend(case, feature, grouped=g, sinks=sinks) for g in (True, False))

    assert torch.equal(grouped, ungrouped)


@pytest.mark.parametrize("feature", ["plain", "window"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]], ids=str)
def test_a_row_alone_equals_the_row_in_a_batch_to_the_bit(shape: Shape, feature: str) -> None:
    together = attend(DecodeCase(MIXED, shape), feature)

    for index, row in enumerate(MIXED):
        assert torch.equal(attend(DecodeCase([row], shape, seed=3), feature)[0], together[index])


def test_rows_in_another_order_keep_their_bits() -> None:
    shape = SHAPES[1]
    forward = attend(DecodeCase(MIXED, shape), "plain")
    backward = attend(DecodeCase(MIXED[::-1], shape, seed=5), "plain")

    assert torch.equal(forward, backward.flip(0))


def test_room_for_more_changes_nothing() -> None:
    """A captured graph has room for the largest step of its bucket; what is not used exits at once."""
    shape = SHAPES[1]
    case = DecodeCase(MIXED[:4], shape)
    needed = shape_for(case.plan(rows_per_item(7), None))
    room = TableShape(
        needed.num_rows + 5, needed.num_items + 11, needed.num_parts + 7, needed.table_width + 3
    )

    assert torch.equal(attend(case, "plain"), attend(case, "plain", room=room))


def test_longer_rows_need_no_other_tables_than_their_lengths() -> None:
    """What a graph replays: the tables of an earlier step, with new lengths written over the old."""
    shape = SHAPES[0]
    case = DecodeCase([Row("a", 40, 30), Row("a", 40, 200), Row("b", 5, 100)], shape)
    expected = attend(case, "plain")
    now = case.rows
    case.rows = [replace(row, kv_len=row.kv_len - 20) for row in now]
    plan = case.plan(rows_per_item(7), None)
    tables = tables_of(plan)
    case.rows = now

    tables.kv_lens[: len(now)] += 20
    partial = decode_partials(
        case.queries, case.keys, case.values, tables, **settings(shape, "plain")
    )
    out = torch.empty_like(expected)
    merge_partials(*partial, tables, out)

    assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's, by numpy
def test_a_row_that_went_non_finite_fails_alone() -> None:
    shape = SHAPES[0]
    case = DecodeCase([Row("a", 40, 3), Row("a", 40, 9), Row("a", 40, 20)], shape)
    expected = attend(case, "plain")
    case.queries[1] = math.nan
    tables = tables_of(case.plan(rows_per_item(7), None))

    partial = decode_partials(
        case.queries, case.keys, case.values, tables, **settings(shape, "plain")
    )
    out = torch.empty_like(expected)
    merge_partials(*partial, tables, out)

    assert bool(out[1].isnan().all())
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], Shape(32, 8, 128, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_equals_the_torch_line_in_double(
    dtype: torch.dtype, shape: Shape, feature: str
) -> None:
    """Only on a GPU: the interpreter multiplies bfloat16 wrongly."""
    shape = replace(shape, dtype=dtype)
    case = DecodeCase(MIXED, shape)
    sinks = torch.linspace(-1, 2, shape.Hq).to(KERNEL_DEVICE)
    ours = attend(case, feature, sinks=sinks)

    plan = case.plan(rows_per_item(shape.Hq // shape.H), FEATURES[feature].get("window"))
    tables = tables_of(plan)
    wide = (case.queries.double(), case.keys.double(), case.values.double())
    partial = decode_partials_in_torch(*wide, tables, **settings(shape, feature))
    expected = torch.empty_like(ours, dtype=torch.float64)
    merge_partials_in_torch(*partial, tables, expected, sinks=sinks.double())

    bound = 2**-7 if dtype == torch.bfloat16 else 2**-9
    torch.testing.assert_close(ours.double(), expected, rtol=bound, atol=bound)
