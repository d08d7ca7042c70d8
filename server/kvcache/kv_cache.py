"""The K/V tensors behind the block ids: one pool for resident prefixes and for requests.

Owned by the engine thread; allocated once at start, written by the attention layer (own tokens) and by
`write_prefix` (a whole prefix, once, before anyone reads it).

Shapes: S = (num_blocks + 1) * block_size slots, H = kv heads, D = head dim. A slot is one token's address:
slot = block_id * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefix_store.artifact import Prefix
from prefix_store.spec import KVLayout
from server.kvcache.to_device import to_device


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's pool. Block 0 stays zero: padded gathers read it."""

    keys: Tensor  # [S, H, Dk]
    values: Tensor  # [S, H, Dv]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts T tokens' keys [T, H, Dk] and values [T, H, Dv] at slots [T]."""
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.values.index_copy_(0, slots, values.to(self.values.dtype))


def slots_of(block_ids: Sequence[int], block_size: int, num_tokens: int) -> Tensor:
    """Slots [num_tokens] of the first tokens of a block table, int64, on the host."""
    blocks = torch.tensor(block_ids, dtype=torch.int64)
    return (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:num_tokens]


class KVCache:
    """All layers' pools. Behind the blocks stands one more that nobody reads, for rows that only fill a batch."""

    def __init__(
        self, layout: KVLayout, num_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.scratch_slot = num_blocks * block_size
        num_slots = self.scratch_slot + block_size
        dtype = getattr(torch, layout.dtype)
        # Zeros, not empty: a masked slot holding NaN would still poison its row (0 * NaN).
        self.layers = tuple(
            LayerKV(
                torch.zeros(
                    num_slots, layer.num_kv_heads, layer.key_dim, dtype=dtype, device=device
                ),
                torch.zeros(
                    num_slots, layer.num_kv_heads, layer.value_dim, dtype=dtype, device=device
                ),
            )
            for layer in layout.layers
        )

    def slots(self, block_ids: Sequence[int], num_tokens: int) -> Tensor:
        """`slots_of` with this pool's block size."""
        return slots_of(block_ids, self.block_size, num_tokens)

    def write_prefix(self, block_ids: Sequence[int], prefix: Prefix) -> None:
        """Copies a prefix into its blocks; the tail of the last block stays as it is, unread.

        Its tensors may be on the device already (`prefix_transfer.Staging`), in memory of another stream.
        """
        assert len(prefix.keys) == len(self.layers), "validation has checked the layer count"
        num_virtual_tokens = prefix.keys[0].shape[0]
        slots = to_device(self.slots(block_ids, num_virtual_tokens), self.device)
        for layer, keys, values in zip(self.layers, prefix.keys, prefix.values, strict=True):
            layer.write(slots, self._here(keys), self._here(values))

    def _here(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, where its memory is not used again before this stream has read it."""
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor.to(self.device, non_blocking=True)

    def zero_blocks(self, block_ids: Sequence[int]) -> None:
        """Wipes blocks whose content must not be met again (a row that went non-finite)."""
        slots = to_device(self.slots(block_ids, len(block_ids) * self.block_size), self.device)
        for layer in self.layers:
            layer.keys.index_fill_(0, slots, 0)
            layer.values.index_fill_(0, slots, 0)
