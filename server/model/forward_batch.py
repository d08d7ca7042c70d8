"""A step plan as tensors: what the model and the attention layers read during one forward pass.

Built by `ModelRunner` on the engine thread for each step, never reused. Packed and ragged: the tokens of
all rows stand one after another in one sequence of T tokens. Behind them stand a few that nobody reads, where
`PackShape` asks for them: the model sees T' >= T tokens, attention and the pool see T.

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
from server.kvcache.to_device import to_device
from server.model.pack_shape import AS_IT_IS, PackShape

_T = TypeVar("_T")

# K/V lengths are padded to a multiple of this. A fixed multiple, and not the longest row as it is, keeps the
# vectorised sums of a token in the same lanes whatever its batch mates are.
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


@dataclass(frozen=True)
class TokenGroup:
    """B tokens of like K/V length, attended in one call. Which keys one sees is in `mask` alone."""

    tokens: slice | Tensor  # B tokens of the pack: those between two ends, or the indices [B]
    length: int  # L, the padded K/V length of each
    kv_lens: Tensor  # [B]

    @cached_property
    def _masks(self) -> dict[int | None, Tensor]:
        return {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, [B, 1, 1, L]: 0 where a token sees a key; it is itself key kv_len - 1.

        Made once per step and window, used by every layer.
        """
        if window not in self._masks:
            position = torch.arange(self.length, device=self.kv_lens.device)
            seen = position < self.kv_lens[:, None]
            if window is not None:
                seen &= position > self.kv_lens[:, None] - 1 - window
            hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._masks[window] = hidden.masked_fill_(~seen, float("-inf"))[:, None, None, :]
        return self._masks[window]


@dataclass(frozen=True)
class DecodeGroup(TokenGroup):
    """Rows of one token each."""

    kv_slots: Tensor  # [B * L] row after row, each padded with slots of the null block


@dataclass(frozen=True)
class PrefillGroup:
    """A row of several tokens, which read the same slots. Each is attended as if it were decoded alone."""

    kv_slots: Tensor  # [L of the last stretch] padded with slots of the null block
    stretches: tuple[TokenGroup, ...]


@dataclass(frozen=True)
class ForwardBatch:
    """One step. The first `num_logits` of `logits_indices` are the tokens whose next token is wanted, in row order: first
    of those rows that sample, then of those that are told of their prompt's.
    """

    input_ids: Tensor  # [1, T']
    position_ids: Tensor  # [1, T']
    slot_mapping: Tensor  # [T] where each token's K/V goes
    logits_indices: Tensor  # [>= num_logits]
    num_logits: int
    rows: tuple[RowSpan, ...]
    device: torch.device

    @property
    def num_tokens(self) -> int:
        """T, without those that only fill the pack."""
        return len(self.slot_mapping)

    @cached_property
    def prefill_rows(self) -> tuple[RowSpan, ...]:
        """Rows of several tokens."""
        return tuple(row for row in self.rows if row.num_tokens > 1)

    @cached_property
    def decode_groups(self) -> tuple[DecodeGroup, ...]:
        """One-token rows, grouped by padded K/V length so that no row pays for a much longer one."""
        buckets: dict[int, list[int]] = {}
        for index, row in enumerate(self.rows):
            if row.num_tokens == 1:
                buckets.setdefault(_bucket(row.kv_len), []).append(index)
        return tuple(self._decode_group(length, found) for length, found in sorted(buckets.items()))

    def _decode_group(self, length: int, indices: list[int]) -> DecodeGroup:
        rows = [self.rows[index] for index in indices]
        slots = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, (index, row) in enumerate(zip(indices, rows, strict=True)):
            slots[i, : row.kv_len] = self._slot_table[index, : row.kv_len]
        first = rows[0].first
        # The scheduler puts one-token rows first, so they mostly stand side by side: no copy is needed then.
        together = all(row.first == first + i for i, row in enumerate(rows))
        tokens = to_device(torch.tensor([row.first for row in rows]), self.device)
        return DecodeGroup(
            tokens=slice(first, first + len(rows)) if together else tokens,
            length=length,
            kv_lens=to_device(torch.tensor([row.kv_len for row in rows]), self.device),
            kv_slots=to_device(slots.flatten(), self.device),
        )

    @cached_property
    def prefill_groups(self) -> tuple[PrefillGroup, ...]:
        """The rows of several tokens, each cut where the padded K/V length of its tokens grows."""
        return tuple(self._prefill_group(row) for row in self.prefill_rows)

    def _prefill_group(self, row: RowSpan) -> PrefillGroup:
        slots = torch.zeros(_bucket(row.kv_len), dtype=torch.int64)
        slots[: row.kv_len] = row.kv_slots
        stretches = []
        seen, offset = row.kv_len - row.num_tokens + 1, row.num_tokens - row.kv_len - 1 + row.first
        while seen <= row.kv_len:
            length = _bucket(seen)
            stop = min(length, row.kv_len) + 1
            stretches.append(
                TokenGroup(
                    tokens=slice(offset + seen, offset + stop),
                    length=length,
                    kv_lens=torch.arange(seen, stop, device=self.device),
                )
            )
            seen = stop
        return PrefillGroup(to_device(slots, self.device), tuple(stretches))

    @cached_property
    def _slot_table(self) -> Tensor:
        return _slot_table(self.rows)

    @cached_property
    def _derived(self) -> dict[Hashable, object]:
        return {}

    def derive(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What `make` gives, made once per step and key: for what a backend needs in every layer."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[return-value] # whoever has the key put it there


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


def build_forward_batch(
    rows: Sequence[ScheduledRow], kv_cache: KVCache, pack_shape: PackShape = AS_IT_IS
) -> ForwardBatch:
    """Lays the rows of a plan out as tensors on the cache's device."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampling: list[int] = []
    told: list[int] = []
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
        first_told = len(token_ids) + row.told_from - row.start
        told.extend(range(first_told, first_told + len(row.told_token_ids)))
        slots.extend(row.block_ids[i // size] * size + i % size for i in range(row.start, end))
        token_ids.extend(row.token_ids)
        positions.extend(range(row.first_position + row.start, row.first_position + end))
        if row.sample:
            sampling.append(len(token_ids) - 1)
    filling = [0] * (pack_shape.padded(len(token_ids)) - len(token_ids))
    wanted = sampling + told
    repeated = wanted[-1:] * (pack_shape.min_tokens - len(wanted))
    device = kv_cache.device
    return ForwardBatch(
        input_ids=to_device(torch.tensor([token_ids + filling]), device),
        position_ids=to_device(torch.tensor([positions + filling]), device),
        slot_mapping=to_device(torch.tensor(slots), device),
        logits_indices=to_device(torch.tensor(wanted + repeated, dtype=torch.int64), device),
        num_logits=len(wanted),
        rows=tuple(spans),
        device=device,
    )


def _slot_table(rows: Sequence[RowSpan]) -> Tensor:
    """Slots [R, longest row] of each row's keys; behind its end anything. For all rows at once: a few tensors a row
    would cost more than the rest of the step's bookkeeping."""
    block_size = rows[0].block_size
    tables = [row.prefix_block_ids + row.own_block_ids for row in rows]
    width = max(map(len, tables))
    blocks = torch.tensor([table + (0,) * (width - len(table)) for table in tables])
    prefix_lens = torch.tensor([row.prefix_len for row in rows])[:, None]
    prefix_blocks = torch.tensor([len(row.prefix_block_ids) for row in rows])[:, None]
    # Own tokens begin on a fresh block: key j stands as far on as if the prefix filled its last block.
    index = torch.arange(width * block_size).expand(len(rows), -1)
    index = index + (prefix_blocks * block_size - prefix_lens) * (index >= prefix_lens)
    index = index.clamp_(max=width * block_size - 1)
    block = blocks.gather(1, index.div(block_size, rounding_mode="floor"))
    return block * block_size + index.remainder(block_size)
