"""The prompt cache: full blocks of tokens that were computed once, read again by whoever has the same beginning.

Owned by the engine thread, driven by the scheduler. Pure host code: it decides block ids; what stands in them
was written by the row that computed it, and is never written again.

A block is known by everything its K/V depend on, and by whose it is: a salt, the digest of the prefix, the
position of the first own token, and all tokens from the first up to its last. These go into a chain of BLAKE2b
hashes of 32 bytes, a block's own key being the hash of its parent's key and its tokens, so two different
beginnings have one key only if that hash is broken. Nobody looks a block up by less.

Life of a block:

    enter()            full and computed: the sequence's own block becomes the cache's, leased by the sequence
    reuse()            a sequence leases what it would have computed; blocks are read, shared, never written
    give_back()        leases end; a block without one stays, and counts as free room
    make_room()        idle blocks go, least recently used first, the end of a beginning before its start
    drop()             a row that read or wrote these failed: nobody is given them any more
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, TypeAlias

from server.kvcache.block_pool import BlockPool

_KEY_BYTES: Final = 32
Tokens: TypeAlias = Callable[[int, int], tuple[int, ...]]
"""A sequence's own tokens start..stop-1, which never change once they are known."""


@dataclass(slots=True, eq=False)
class CachedBlock:
    """K/V of `block_size` tokens behind those of `parent`. `dropped`: only its present readers have it."""

    key: bytes
    block_id: int
    parent: CachedBlock | None
    num_leases: int = 0
    dropped: bool = False
    children: dict[bytes, CachedBlock] = field(default_factory=dict)  # by key, in order of entry


@dataclass(slots=True, eq=False)
class BlockChain:
    """One sequence's place in the cache: `blocks` are those that it leases, from its first token on.

    `keys`: that of the root, then of each full block as far as they were asked for.
    """

    keys: list[bytes]
    blocks: list[CachedBlock] = field(default_factory=list)

    @classmethod
    def begin(cls, salt: str, digest: str | None, first_position: int) -> BlockChain:
        """The chain of tokens that begin at `first_position` behind the prefix `digest`, for those of `salt`."""
        # A client's text: what is no Unicode must not end the engine that encodes it.
        parts = [text.encode("utf-8", "surrogatepass") for text in (salt, digest or "")]
        lengths = struct.pack("<3q", *map(len, parts), first_position)
        return cls([blake2b(lengths + b"".join(parts), digest_size=_KEY_BYTES).digest()])

    def key(self, index: int, tokens: Tokens, block_size: int) -> bytes:
        """That of full block `index`."""
        while len(self.keys) <= index + 1:
            start = (len(self.keys) - 1) * block_size
            packed = struct.pack(f"<{block_size}q", *tokens(start, start + block_size))
            self.keys.append(blake2b(self.keys[-1] + packed, digest_size=_KEY_BYTES).digest())
        return self.keys[index + 1]


class PromptCache:
    """Key -> block. A sequence's block table begins with the blocks that its chain leases; the rest is its own.

    Invariants: a block's parent is in the cache as long as it is itself, and is leased by all who lease it, so an
    idle block goes before its parent; an entry is idle exactly without a lease.
    """

    def __init__(self, blocks: BlockPool, *, enabled: bool = True) -> None:
        self._blocks = blocks
        self._enabled = enabled
        self._entries: dict[bytes, CachedBlock] = {}
        self._idle: OrderedDict[bytes, CachedBlock] = OrderedDict()  # least recently used first
        self._dropped: set[CachedBlock] = set()  # until their last reader ends
        self._num_asked_tokens = 0
        self._num_hit_tokens = 0

    @property
    def num_blocks(self) -> int:
        """Blocks held, those that are read now included."""
        return len(self._entries) + len(self._dropped)

    @property
    def num_evictable_blocks(self) -> int:
        """Blocks that nobody reads."""
        return len(self._idle)

    def block_ids(self) -> set[int]:
        """All blocks held: nobody may write them."""
        return {entry.block_id for entry in (*self._entries.values(), *self._dropped)}

    def missing_key(self, chain: BlockChain, tokens: Tokens, num_blocks: int) -> bytes | None:
        """The key of the first of `num_blocks` full blocks that is not cached; None if all are, or it is off."""
        if not self._enabled:
            return None
        keys = (self._key(chain, index, tokens) for index in range(num_blocks))
        return next((key for key in keys if key not in self._entries), None)

    def reuse(self, chain: BlockChain, table: list[int], tokens: Tokens, num_blocks: int) -> int:
        """Leases those of the first `num_blocks` blocks that are cached, without a gap; returns how many
        are leased now. Own blocks of `table` that they stand for are freed.
        """
        if self._enabled and not self._is_cut_off(chain):
            for index in range(len(chain.blocks), num_blocks):
                entry = self._entries.get(self._key(chain, index, tokens))
                if entry is None:
                    break
                self._lease(entry, chain, table)
        return len(chain.blocks)

    def enter(self, chain: BlockChain, table: list[int], tokens: Tokens, num_blocks: int) -> None:
        """The first `num_blocks` blocks of `table` are full, computed, and proved by finite logits.

        One that another sequence entered meanwhile takes the place of this sequence's own.
        """
        if not self._enabled:
            return
        for index in range(len(chain.blocks), num_blocks):
            if self._is_cut_off(chain):
                break
            key = self._key(chain, index, tokens)
            entry = self._entries.get(key)
            if entry is None:
                entry = CachedBlock(key, table[index], chain.blocks[-1] if chain.blocks else None)
                self._entries[key] = entry
                if entry.parent is not None:
                    entry.parent.children[key] = entry
                entry.num_leases = 1
                chain.blocks.append(entry)
            else:
                self._lease(entry, chain, table)

    def give_back(self, chain: BlockChain, table: list[int]) -> None:
        """Ends the leases of a chain and frees the own blocks of its table, which is empty then."""
        self._blocks.free(table[len(chain.blocks) :])
        table.clear()
        while chain.blocks:  # the last one first: it is to go before those that it stands on
            self._release(chain.blocks.pop())

    def drop(self, chain: BlockChain) -> None:
        """Takes what a chain leases, or leased until it was given back, and all that was computed behind it, out of the cache.

        Whoever reads it already goes on; the blocks are freed when nobody does.
        """
        first = chain.blocks[0] if chain.blocks else self._known_beginning(chain)
        fallen = [] if first is None or first.dropped else [first]
        while fallen:
            entry = fallen.pop()
            fallen.extend(entry.children.values())
            entry.children.clear()
            del self._entries[entry.key]
            entry.dropped = True
            if self._idle.pop(entry.key, None) is None:
                self._dropped.add(entry)
            else:
                self._blocks.free([entry.block_id])

    def _known_beginning(self, chain: BlockChain) -> CachedBlock | None:
        return self._entries.get(chain.keys[1]) if len(chain.keys) > 1 else None

    def make_room(self, num_blocks: int) -> None:
        """Evicts least recently used blocks until `num_blocks` are free or none can go."""
        while self._idle and self._blocks.num_free < num_blocks:
            key, entry = self._idle.popitem(last=False)
            assert not entry.children, "a block goes before those that it stands on"
            del self._entries[key]
            if entry.parent is not None:
                del entry.parent.children[key]
            self._blocks.free([entry.block_id])

    def count(self, num_asked_tokens: int, num_hit_tokens: int) -> None:
        """Notes how many tokens of a prompt could have been here, and how many were."""
        self._num_asked_tokens += num_asked_tokens
        self._num_hit_tokens += num_hit_tokens

    def take_counts(self) -> tuple[int, int]:
        """What was noted since this was last asked."""
        counts = self._num_asked_tokens, self._num_hit_tokens
        self._num_asked_tokens = self._num_hit_tokens = 0
        return counts

    def _key(self, chain: BlockChain, index: int, tokens: Tokens) -> bytes:
        return chain.key(index, tokens, self._blocks.block_size)

    def _is_cut_off(self, chain: BlockChain) -> bool:
        """Whether the sequence reads dropped blocks: nothing that stands on them is shared."""
        return bool(chain.blocks) and chain.blocks[-1].dropped

    def _lease(self, entry: CachedBlock, chain: BlockChain, table: list[int]) -> None:
        index = len(chain.blocks)
        self._blocks.free(table[index : index + 1])
        table[index : index + 1] = [entry.block_id]
        entry.num_leases += 1
        self._idle.pop(entry.key, None)
        chain.blocks.append(entry)

    def _release(self, entry: CachedBlock) -> None:
        entry.num_leases -= 1
        if entry.num_leases > 0:
            return
        if entry.dropped:
            self._dropped.remove(entry)
            self._blocks.free([entry.block_id])
        else:
            self._idle[entry.key] = entry

    def check_invariants(self, chains: Iterable[BlockChain]) -> None:
        """Recomputes the class invariants from scratch; `chains` are all there are. For tests and the debug loop."""
        leases: Counter[CachedBlock] = Counter()
        for chain in chains:
            leases.update(chain.blocks)
            parents = [None, *chain.blocks[:-1]]
            assert [entry.parent for entry in chain.blocks] == parents[: len(chain.blocks)]
            assert [entry.key for entry in chain.blocks] == chain.keys[1 : len(chain.blocks) + 1]
        held = [*self._entries.values(), *self._dropped]
        assert len(self.block_ids()) == len(held), "a block is cached twice"
        assert leases.keys() <= set(held), "a lease on a block that is not held"
        assert all(entry.num_leases == leases[entry] for entry in held), "a lease leaked"
        assert all(entry.num_leases > 0 for entry in self._dropped), "a dropped block has a reader"
        idle = [key for key, entry in self._entries.items() if entry.num_leases == 0]
        assert set(idle) == self._idle.keys(), "an entry is idle exactly without a lease"
        order = {key: place for place, key in enumerate(self._idle)}
        for key, entry in self._entries.items():
            assert key == entry.key
            assert not entry.dropped
            if entry.parent is not None:
                assert self._entries.get(entry.parent.key) is entry.parent, "a parent left first"
                assert entry.parent.children.get(key) is entry
                last = len(order)  # whoever is read goes after all who are not
                assert order.get(key, last) <= order.get(entry.parent.key, last)
