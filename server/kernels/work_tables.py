"""The integers that the decode kernels read: work items, rows and block tables, in one device buffer.

Made by `server.model.attention` for each step, read by `decode_partials` and `merge_partials`. All shapes
come from a `TableShape`, so that a captured CUDA graph can replay over other contents: padding items have
no rows and padding rows no token, and the kernels leave both at once. Lengths are read on the device, so
a step that only lengthens its rows changes `kv_lens` and nothing else, until a row begins another chunk.

R = rows that decode one token, padded. I = work items, padded. W = width of the block table.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

NUM_ITEM_FIELDS: Final = 5  # first_row, num_rows, part, start, stop


@dataclass(frozen=True, slots=True)
class TableShape:
    """Room for so many of each. `num_parts`: partial results of all rows together, host side only."""

    num_rows: int
    num_items: int
    num_parts: int
    table_width: int

    @property
    def buffer_len(self) -> int:
        """int32 words of all tables."""
        return (
            self.num_items * NUM_ITEM_FIELDS
            + 4 * self.num_rows
            + 1
            + self.num_rows * self.table_width
        )


@dataclass(frozen=True, slots=True)
class WorkTables:
    """Views of one int32 buffer.

    An item is chunk number `part` of rows `first_row`..`first_row + num_rows - 1`: keys `start`..`stop - 1`,
    ended by the rows' length. Several rows only in an item that lies in a prefix which all of them have.
    Key t of a row is in its block table: the blocks of its prefix, then its own, which begin on a new block.
    """

    shape: TableShape
    items: Tensor  # [I, 5]
    tokens: Tensor  # [R] each row's token in the pack, -1 behind the rows
    kv_lens: Tensor  # [R] keys of a row, prefix and this step's token included
    prefix_lens: Tensor  # [R] of which the prefix's
    part_offsets: (
        Tensor  # [R + 1] row r has the partial results part_offsets[r]..part_offsets[r + 1] - 1
    )
    block_table: Tensor  # [R, W]

    @classmethod
    def of(cls, buffer: Tensor, shape: TableShape) -> WorkTables:
        """The tables in a buffer [shape.buffer_len] as `pack` lays them out."""
        R, I, W = shape.num_rows, shape.num_items, shape.table_width  # noqa: E741 - as in the docstring
        items, tokens, kv_lens, prefix_lens, offsets, table = torch.split(
            buffer, [I * NUM_ITEM_FIELDS, R, R, R, R + 1, R * W]
        )
        return cls(
            shape,
            items.view(I, NUM_ITEM_FIELDS),
            tokens,
            kv_lens,
            prefix_lens,
            offsets,
            table.view(R, W),
        )


def pack(
    shape: TableShape,
    items: Sequence[tuple[int, int, int, int, int]],
    tokens: Sequence[int],
    kv_lens: Sequence[int],
    prefix_lens: Sequence[int],
    part_offsets: list[int],
    block_tables: Sequence[Sequence[int]],
) -> Tensor:
    """The buffer [shape.buffer_len] on the host: `tokens` go on with -1, `part_offsets` as they end, the rest with zeros."""
    assert len(items) <= shape.num_items
    assert len(tokens) <= shape.num_rows
    assert part_offsets[-1] <= shape.num_parts
    words = array("i")
    for item in items:
        words.extend(item)
    _pad(words, (shape.num_items - len(items)) * NUM_ITEM_FIELDS)
    missing = shape.num_rows - len(tokens)
    words.extend(tokens)
    words.extend([-1] * missing)
    for column in (kv_lens, prefix_lens):
        words.extend(column)
        _pad(words, missing)
    words.extend(part_offsets)
    words.extend(part_offsets[-1:] * missing)
    for table in block_tables:
        words.extend(table)
        _pad(words, shape.table_width - len(table))
    _pad(words, missing * shape.table_width)
    assert len(words) == shape.buffer_len
    return torch.frombuffer(words, dtype=torch.int32)


def _pad(words: array[int], count: int) -> None:
    assert count >= 0, "the shape has less room than the plan needs"
    words.frombytes(bytes(words.itemsize * count))
