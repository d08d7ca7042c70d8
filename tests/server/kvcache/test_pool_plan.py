"""How many blocks there are, and what is said when there are too few."""

from __future__ import annotations

from typing import Any

import pytest

from prefix_store.spec import KVLayout, LayerLayout
from server.errors import CapacityError
from server.kvcache.memory_account import MemoryAccount, MemoryUse
from server.kvcache.pool_plan import PoolPlan, plan_pool

LAYOUT = KVLayout((LayerLayout(2, 8, 8, None),) * 3, "float32")
BLOCK_BYTES = 4 * LAYOUT.bytes_per_token


def account(total_blocks: float, *, taken_blocks: float = 0) -> MemoryAccount:
    """Of which half may be taken."""
    uses = (MemoryUse("largest step", int(taken_blocks * BLOCK_BYTES), "--max-num-seqs"),)
    return MemoryAccount("free memory", int(total_blocks * BLOCK_BYTES), 0.5, uses)


def plan(**changed: Any) -> PoolPlan:
    settings: dict[str, Any] = {
        "block_size": 4, "kv_cache_bytes": None, "num_blocks": None, "max_model_len": None,
        "position_limit": 64, "max_num_seqs": 8,
    }  # fmt: skip
    return plan_pool(LAYOUT, **(settings | changed))


def test_the_pool_is_what_the_account_leaves() -> None:
    pool = plan(account=account(100, taken_blocks=10.5))

    assert (pool.num_blocks, pool.usable_blocks, pool.num_tokens) == (39, 38, 152)
    assert pool.pool_bytes <= account(100, taken_blocks=10.5).left_bytes
    assert (pool.num_full_requests(), pool.num_prefixes(32), pool.num_prefixes(33)) == (2, 4, 4)


@pytest.mark.parametrize(
    ("stated", "num_blocks"),
    [
        ({"kv_cache_bytes": 21 * BLOCK_BYTES}, 21),
        ({"num_blocks": 22}, 22),
        ({"num_blocks": 22, "kv_cache_bytes": 10**9}, 22),
    ],
)
def test_what_is_stated_goes_before_what_is_measured(
    stated: dict[str, int], num_blocks: int
) -> None:
    assert plan(account=account(1000), **stated).num_blocks == num_blocks
    assert plan(**stated).num_blocks == num_blocks


def test_more_than_could_be_used_is_not_taken() -> None:
    assert plan(account=account(10**6)).num_blocks == 1 + 2 * 8 * (64 // 4)


@pytest.mark.parametrize("taken", [50, 70])
def test_a_refusal_names_every_term_and_what_would_help(taken: int) -> None:
    with pytest.raises(CapacityError) as refused:
        plan(account=account(100, taken_blocks=taken), max_model_len=64)

    message = str(refused.value)
    for part in ("would hold 0 tokens", "free memory", "x 0.5", "- largest step", "= "):
        assert part in message
    for setting in ("--max-num-seqs", "--max-model-len", "--kv-cache-bytes"):
        assert setting in message


def test_a_stated_pool_without_room_for_a_request_is_refused_by_its_own_settings() -> None:
    with pytest.raises(CapacityError, match="raise kv_cache_bytes or num_kv_blocks"):
        plan(kv_cache_bytes=BLOCK_BYTES, account=account(100))
