"""A step plan as tensors: what the model and the attention layers read during one forward pass.

Built by `ModelRunner` on the engine thread for each step, never reused. Packed and ragged: the tokens of
all rows stand one after another in one sequence of T tokens. Behind them stand a few that nobody reads, where
`PackShape` asks for them: the model sees T' >= T tokens, attention and the pool see T.

T = tokens of the step, R = rows, L = K/V length of a row (prefix and own tokens, this step's included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from server.engine.messages import ScheduledRow
from server.kvcache.kv_cache import KVCache
from server.model.pack_shape import AS_IT_IS, PackShape

# K/V lengths are padded to a multiple of this. A fixed multiple, and not the longest row as it is, keeps the
# vectorised sums of a token in the same lanes whatever its batch mates are.
GATHER_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Row r: its tokens are `first`..`first + num_tokens - 1` of the pack, the last of `kv_len` keys."""

    first: int
    num_tokens: int
    kv_len: int
    kv_slots: Tensor  # [kv_len] on the host


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
class PrefillRow:
    """A row of several tokens, which read the same slots. Each is attended as if it were decoded alone."""

    kv_slots: Tensor  # [L of the last stretch] padded with slots of the null block
    stretches: tuple[TokenGroup, ...]


@dataclass(frozen=True)
class ForwardBatch:
    """One step. The first `num_logits` of `logits_indices` are the tokens whose next token is wanted, in row order."""

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
    def decode_groups(self) -> tuple[DecodeGroup, ...]:
        """One-token rows, grouped by padded K/V length so that no row pays for a much longer one."""
        buckets: dict[int, list[RowSpan]] = {}
        for row in self.rows:
            if row.num_tokens == 1:
                buckets.setdefault(_bucket(row.kv_len), []).append(row)
        return tuple(self._decode_group(length, rows) for length, rows in sorted(buckets.items()))

    def _decode_group(self, length: int, rows: list[RowSpan]) -> DecodeGroup:
        slots = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            slots[i, : row.kv_len] = row.kv_slots
        first = rows[0].first
        # The scheduler puts one-token rows first, so they mostly stand side by side: no copy is needed then.
        together = all(row.first == first + i for i, row in enumerate(rows))
        tokens = torch.tensor([row.first for row in rows]).to(self.device)
        return DecodeGroup(
            tokens=slice(first, first + len(rows)) if together else tokens,
            length=length,
            kv_lens=torch.tensor([row.kv_len for row in rows]).to(self.device),
            kv_slots=slots.flatten().to(self.device),
        )

    @cached_property
    def prefill_rows(self) -> tuple[PrefillRow, ...]:
        """Rows of several tokens."""
        return tuple(self._prefill_row(row) for row in self.rows if row.num_tokens > 1)

    def _prefill_row(self, row: RowSpan) -> PrefillRow:
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
        return PrefillRow(slots.to(self.device), tuple(stretches))


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
    slots: list[Tensor] = []
    sampling: list[int] = []
    spans: list[RowSpan] = []
    table = _slot_table(rows, kv_cache.block_size)
    for row, kv_slots in zip(rows, table, strict=True):
        count, end = len(row.token_ids), row.start + len(row.token_ids)
        kv_len = row.num_virtual_tokens + end
        spans.append(RowSpan(len(token_ids), count, kv_len, kv_slots[:kv_len]))
        slots.append(kv_slots[kv_len - count : kv_len])
        token_ids.extend(row.token_ids)
        positions.extend(range(row.first_position + row.start, row.first_position + end))
        if row.sample:
            sampling.append(len(token_ids) - 1)
    filling = [0] * (pack_shape.padded(len(token_ids)) - len(token_ids))
    repeated = sampling[-1:] * (pack_shape.min_tokens - len(sampling))
    device = kv_cache.device
    return ForwardBatch(
        input_ids=torch.tensor([token_ids + filling]).to(device),
        position_ids=torch.tensor([positions + filling]).to(device),
        slot_mapping=torch.cat(slots).to(device),
        logits_indices=torch.tensor(sampling + repeated, dtype=torch.int64).to(device),
        num_logits=len(sampling),
        rows=tuple(spans),
        device=device,
    )


def _slot_table(rows: Sequence[ScheduledRow], block_size: int) -> Tensor:
    """Slots [R, longest row] of each row's prefix and own tokens; behind its end anything. For all rows at once:
    a few tensors a row would cost more than the rest of the step's bookkeeping."""
    tables = [row.prefix_block_ids + row.block_ids for row in rows]
    width = max(map(len, tables))
    blocks = torch.tensor([table + (0,) * (width - len(table)) for table in tables])
    prefix_lens = torch.tensor([row.num_virtual_tokens for row in rows])[:, None]
    prefix_blocks = torch.tensor([len(row.prefix_block_ids) for row in rows])[:, None]
    # Own tokens begin on a fresh block: key j stands as far on as if the prefix filled its last block.
    index = torch.arange(width * block_size).expand(len(rows), -1)
    index = index + (prefix_blocks * block_size - prefix_lens) * (index >= prefix_lens)
    index = index.clamp_(max=width * block_size - 1)
    block = blocks.gather(1, index.div(block_size, rounding_mode="floor"))
    return block * block_size + index.remainder(block_size)
