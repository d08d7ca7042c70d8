"""How many KV blocks the memory holds: the arithmetic, each factor by name.

Runs once at start; called by `server.sizing`. Pure: what memory is free is measured by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefix_store.spec import KVLayout
from server.errors import CapacityError
from server.kvcache.memory_account import MemoryAccount


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """A pool of `num_blocks` blocks, the null block included. `account`: where the memory goes, if it was asked."""

    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int
    account: MemoryAccount | None = None

    @property
    def usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that fit, of prefixes and of requests."""
        return self.usable_blocks * self.block_size

    def num_full_requests(self) -> int:
        """How many requests of `max_model_len` tokens fit at once."""
        return self.usable_blocks // -(-self.max_model_len // self.block_size)

    def num_prefixes(self, num_virtual_tokens: int) -> int:
        """How many prefixes of this length fit, if nothing else were there."""
        return self.usable_blocks // -(-num_virtual_tokens // self.block_size)


def plan_pool(
    layout: KVLayout,
    *,
    block_size: int,
    kv_cache_bytes: int | None,
    num_blocks: int | None,
    max_model_len: int | None,
    position_limit: int | None,
    max_num_seqs: int,
    account: MemoryAccount | None = None,
) -> PoolPlan:
    """Sizes the pool by `num_blocks`, else `kv_cache_bytes`, else what `account` leaves.

    Raises `CapacityError`, naming the settings, when one request does not fit.

    `max_model_len` None takes the model's limit, or what the pool holds if that is less. A pool larger than
    `max_num_seqs` requests of full length, and as much again for prefixes, would never be used.
    """
    block_bytes = layout.bytes_per_token * block_size
    limit = max_model_len or position_limit
    measured = num_blocks is None and kv_cache_bytes is None
    if num_blocks is None:
        assert kv_cache_bytes is not None or account is not None, "nothing says how large"
        budget = (
            kv_cache_bytes if kv_cache_bytes is not None or account is None else account.left_bytes
        )
        num_blocks = max(0, budget or 0) // block_bytes
        if limit is not None:
            num_blocks = min(num_blocks, 1 + 2 * max_num_seqs * -(-limit // block_size))
    fits = (num_blocks - 1) * block_size
    if fits < min(max_model_len or block_size, limit or block_size):
        shown = (
            f"the KV pool would hold {max(0, fits)} tokens ({num_blocks} blocks of {block_size} tokens, "
            f"{block_bytes} bytes each)"
        )
        if measured and account is not None:
            raise CapacityError(f"{shown}: {account}; {_more_room(account, max_model_len)}")
        raise CapacityError(
            f"{shown}; raise kv_cache_bytes or num_kv_blocks, or lower max_model_len"
        )
    return PoolPlan(num_blocks, block_size, block_bytes, min(limit or fits, fits), account)


def _more_room(account: MemoryAccount, max_model_len: int | None) -> str:
    shorter = "" if max_model_len is None else ", or lower --max-model-len"
    return f"{account.remedy()}{shorter}, or say with --kv-cache-bytes what the pool may take"
