"""How many KV blocks the memory holds: the arithmetic, each factor by name.

Runs once at start; called by `server.bootstrap`. Pure: what memory is free is measured by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefix_store.spec import KVLayout
from server.errors import CapacityError


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """A pool of `num_blocks` blocks, the null block included."""

    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int

    @property
    def usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def num_full_requests(self) -> int:
        """How many requests of `max_model_len` tokens fit at once."""
        return self.usable_blocks // -(-self.max_model_len // self.block_size)


def plan_pool(
    layout: KVLayout,
    *,
    block_size: int,
    budget_bytes: int,
    num_blocks: int | None,
    max_model_len: int | None,
    position_limit: int | None,
    max_num_seqs: int,
) -> PoolPlan:
    """Sizes the pool. Raises `CapacityError`, naming the setting, when one request does not fit.

    `max_model_len` None takes the model's limit, or what the pool holds if that is less. A pool larger than
    `max_num_seqs` requests of full length, and as much again for prefixes, would never be used.
    """
    block_bytes = layout.bytes_per_token * block_size
    limit = max_model_len or position_limit
    if num_blocks is None:
        num_blocks = budget_bytes // block_bytes
        if limit is not None:
            num_blocks = min(num_blocks, 1 + 2 * max_num_seqs * -(-limit // block_size))
    fits = (num_blocks - 1) * block_size
    if fits < min(max_model_len or block_size, limit or block_size):
        raise CapacityError(
            f"the KV pool would hold {max(0, fits)} tokens ({num_blocks} blocks of {block_size} tokens, "
            f"{block_bytes} bytes each); raise kv_cache_bytes or num_kv_blocks, or lower max_model_len"
        )
    return PoolPlan(num_blocks, block_size, block_bytes, min(limit or fits, fits))
