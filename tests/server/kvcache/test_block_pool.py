"""The pool against a twin that keeps an owner per block in a list."""

from __future__ import annotations

import random

import pytest

from server.kvcache.block_pool import NULL_BLOCK, BlockPool


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_agree_with_a_slow_twin(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(num_blocks=rng.randint(2, 40), block_size=rng.randint(1, 16))
    owner: list[int | None] = [None] * pool.num_blocks  # the twin
    held: dict[int, list[int]] = {}
    for number in range(300):
        if held and rng.random() < 0.5:
            name = rng.choice(list(held))
            pool.free(held[name])
            for block_id in held.pop(name):
                owner[block_id] = None
        else:
            free = [b for b in range(1, pool.num_blocks) if owner[b] is None]
            held[number] = pool.allocate(rng.randint(0, len(free)))
            for block_id in held[number]:
                assert owner[block_id] is None, "handed out twice"
                owner[block_id] = number
        pool.check_invariants()
        assert pool.num_used == sum(o is not None for o in owner)
        assert pool.num_free + pool.num_used == pool.capacity == pool.num_blocks - 1
        assert owner[NULL_BLOCK] is None, "the null block was handed out"


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2)]
)
def test_tokens_need_whole_blocks(num_tokens: int, expected: int) -> None:
    assert BlockPool(4, block_size=4).blocks_for(num_tokens) == expected


def test_a_block_can_not_be_freed_twice_nor_without_being_handed_out() -> None:
    pool = BlockPool(4, 4)
    taken = pool.allocate(1)
    pool.free(taken)

    for block_id in (*taken, NULL_BLOCK, 99):
        with pytest.raises(AssertionError, match="not handed out"):
            pool.free([block_id])


def test_more_than_is_free_can_not_be_had() -> None:
    pool = BlockPool(4, 4)
    pool.allocate(2)

    with pytest.raises(AssertionError, match="2 blocks asked, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_freed_blocks_are_used_again_last() -> None:
    """The longest possible time before a block's old content is overwritten makes stale reads show."""
    pool = BlockPool(5, 4)
    first = pool.allocate(2)
    pool.free(first)

    assert pool.allocate(2) == [3, 4]
    assert pool.allocate(2) == first
