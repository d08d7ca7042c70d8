"""A step plan as tensors: what the model and the attention layers read during one forward pass.

Built by `ModelRunner` on the engine thread for each step, never reused. Packed and ragged: the tokens of
all rows stand one after another in one sequence of T tokens; nothing is padded except gather indices.

T = tokens of the step, R = rows, L = K/V length of a row (prefix and own tokens, this step's included).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from server.engine.messages import ScheduledRow
from server.kvcache.kv_cache import KVCache, slots_of

_T = TypeVar("_T")

# Gathers of decode rows are padded to a multiple of this. A fixed multiple, and not the longest row as it
# is, keeps the vectorised sums of a row in the same lanes whatever its batch mates are.
GATHER_MULTIPLE = 64


@dataclass(frozen=True)
class RowSpan:
    """Row r: its tokens are `first`..`first + num_tokens - 1` of the pack, the last of `kv_len` keys.

    The first `prefix_len` keys are in the prefix's blocks, which rows of one prefix have in common.
    """

    first: int
    num_tokens: int
    kv_len: int
    prefix_len: int
    prefix_block_ids: tuple[int, ...]
    own_block_ids: tuple[int, ...]
    block_size: int

    @cached_property
    def kv_slots(self) -> Tensor:
        """[kv_len] on the host; made when asked for, as a backend that reads block tables does without."""
        own_len = self.kv_len - self.prefix_len
        prefix = slots_of(self.prefix_block_ids, self.block_size, self.prefix_len)
        return torch.cat([prefix, slots_of(self.own_block_ids, self.block_size, own_len)])


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A row of several tokens."""

    first: int
    num_tokens: int
    kv_len: int
    kv_slots: Tensor  # [kv_len] on the device


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one token each, of like K/V length, attended in one call."""

    tokens: Tensor  # [B] index of each row's token in the pack
    kv_slots: Tensor  # [B, L] padded with slots of the null block
    kv_lens: Tensor  # [B]

    def visible(self, window: int | None) -> Tensor:
        """Mask [B, 1, 1, L]: which keys each row's token sees; it is itself key kv_len - 1."""
        position = torch.arange(self.kv_slots.shape[1], device=self.kv_slots.device)
        seen = position < self.kv_lens[:, None]
        if window is not None:
            seen &= position > self.kv_lens[:, None] - 1 - window
        return seen[:, None, None, :]


@dataclass(frozen=True)
class ForwardBatch:
    """One step. `logits_indices` are the tokens whose next token is wanted, in row order."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    slot_mapping: Tensor  # [T] where each token's K/V goes
    logits_indices: Tensor  # [number of sampling rows]
    rows: tuple[RowSpan, ...]
    device: torch.device

    @cached_property
    def decode_groups(self) -> tuple[DecodeGroup, ...]:
        """One-token rows, grouped by padded K/V length so that no row pays for a much longer one."""
        buckets: dict[int, list[RowSpan]] = {}
        for row in self.rows:
            if row.num_tokens == 1:
                buckets.setdefault(_bucket(row.kv_len), []).append(row)
        return tuple(self._group(length, rows) for length, rows in sorted(buckets.items()))

    def _group(self, length: int, rows: list[RowSpan]) -> DecodeGroup:
        slots = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            slots[i, : row.kv_len] = row.kv_slots
        return DecodeGroup(
            tokens=torch.tensor([row.first for row in rows]).to(self.device),
            kv_slots=slots.to(self.device),
            kv_lens=torch.tensor([row.kv_len for row in rows]).to(self.device),
        )

    @cached_property
    def prefill_rows(self) -> tuple[PrefillRow, ...]:
        """Rows of several tokens, with their slots on the device."""
        return tuple(
            PrefillRow(row.first, row.num_tokens, row.kv_len, row.kv_slots.to(self.device))
            for row in self.rows
            if row.num_tokens > 1
        )

    @cached_property
    def _derived(self) -> dict[Hashable, object]:
        return {}

    def derive(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What `make` gives, made once per step and key: for what a backend needs in every layer."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[return-value] # whoever has the key put it there

    @cached_property
    def _masks(self) -> dict[tuple[int, int | None], Tensor]:
        return {}

    def prefill_mask(self, row_index: int, window: int | None) -> Tensor:
        """Mask [n, L] of a prefill row; made once per step and window, used by every layer."""
        key = (row_index, window)
        if key not in self._masks:
            row = self.prefill_rows[row_index]
            self._masks[key] = causal_mask(row.num_tokens, row.kv_len, window, self.device)
        return self._masks[key]

    def decode_mask(self, group_index: int, window: int | None) -> Tensor:
        """Mask [B, 1, 1, L] of a decode group; made once per step and window."""
        key = (-1 - group_index, window)
        if key not in self._masks:
            self._masks[key] = self.decode_groups[group_index].visible(window)
        return self._masks[key]


def _bucket(kv_len: int) -> int:
    """A padded length >= kv_len: multiples of 64, growing by at most a quarter."""
    step = GATHER_MULTIPLE
    while step * 4 < kv_len:
        step *= 2
    return -(-kv_len // step) * step


def causal_mask(num_tokens: int, kv_len: int, window: int | None, device: torch.device) -> Tensor:
    """Mask [n, L] of the last `num_tokens` of `kv_len` tokens: causal, and inside `window` if there is one.

    Prefix tokens are keys 0..P-1 and count as positions of the window, as with PEFT.
    """
    key = torch.arange(kv_len, device=device)
    query = torch.arange(kv_len - num_tokens, kv_len, device=device)[:, None]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask


def build_forward_batch(rows: Sequence[ScheduledRow], kv_cache: KVCache) -> ForwardBatch:
    """Lays the rows of a plan out as tensors on the cache's device."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampling: list[int] = []
    spans: list[RowSpan] = []
    size = kv_cache.block_size
    for row in rows:
        count, end = len(row.token_ids), row.start + len(row.token_ids)
        spans.append(
            RowSpan(
                first=len(token_ids),
                num_tokens=count,
                kv_len=row.num_virtual_tokens + end,
                prefix_len=row.num_virtual_tokens,
                prefix_block_ids=row.prefix_block_ids,
                own_block_ids=row.block_ids,
                block_size=size,
            )
        )
        slots.extend(row.block_ids[i // size] * size + i % size for i in range(row.start, end))
        token_ids.extend(row.token_ids)
        positions.extend(range(row.first_position + row.start, row.first_position + end))
        if row.sample:
            sampling.append(len(token_ids) - 1)
    device = kv_cache.device
    return ForwardBatch(
        input_ids=torch.tensor([token_ids]).to(device),
        position_ids=torch.tensor([positions]).to(device),
        slot_mapping=torch.tensor(slots).to(device),
        logits_indices=torch.tensor(sampling, dtype=torch.int64).to(device),
        rows=tuple(spans),
        device=device,
    )
