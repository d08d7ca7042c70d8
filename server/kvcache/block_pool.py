"""Bookkeeping of KV blocks: which ids are free.

Owned by the engine thread; called by the scheduler (own blocks of sequences) and by `ResidentPrefixes`
(blocks of prefixes), which both give back exactly what they took. Pure host code: no tensors, no clock.

Block 0 is the null block: never handed out and always zero. Attention pads gathers with its slots, so a
padded entry can not carry a stale value of another request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

NULL_BLOCK = 0


class BlockPool:
    """Hands out block ids 1..num_blocks-1.

    Invariant: every id but the null block is either free, once, or handed out, once.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, "a pool holds the null block and at least one other"
        assert block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(1, num_blocks))
        self._used: set[int] = set()

    @property
    def capacity(self) -> int:
        """How many blocks can be handed out in all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` block ids, now the caller's. The caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        taken = [self._free.popleft() for _ in range(count)]
        self._used.update(taken)
        return taken

    def free(self, block_ids: Iterable[int]) -> None:
        """Takes back blocks that `allocate` handed out."""
        for block_id in block_ids:
            assert block_id in self._used, f"block {block_id} is not handed out"
            self._used.remove(block_id)
            self._free.append(block_id)

    def check_invariants(self) -> None:
        """Recomputes the class invariant from scratch; for tests and the debug loop."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._used, "a block is both free and used"
        assert free | self._used == set(range(1, self.num_blocks)), "a block is lost"
