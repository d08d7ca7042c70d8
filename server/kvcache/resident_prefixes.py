"""The device tier: which prefixes are in the KV pool, who reads them, and which one goes next.

Owned by the engine thread, driven by the scheduler. Pure host code: it decides block ids, the runner
writes the tensors. Keyed by content digest, never by task name, so two versions of a task never mix.

Life of a resident prefix, and who may do what with its blocks:

    reserve()          blocks taken from the pool; the runner writes them in the step just planned
    acquire()/release  a running sequence holds a lease: blocks are read, shared, never written
    pin()/unpin        an operator's hold; not counted as a lease
    evict()            only without lease and pin: blocks go back to the pool
    retire()           evict now, or when the last lease ends
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from server.kvcache.block_pool import BlockPool
from server.types import PrefixRef


@dataclass(slots=True, eq=False)
class ResidentPrefix:
    """One prefix in the pool. `num_leases` counts the sequences that read it now."""

    ref: PrefixRef
    block_ids: tuple[int, ...]
    num_leases: int = 0
    pinned: bool = False
    retired: bool = False

    @property
    def evictable(self) -> bool:
        return self.num_leases == 0 and not self.pinned


@dataclass(slots=True, eq=False)
class PrefixLease:
    """The right of one sequence to read a resident prefix until it is released."""

    resident: ResidentPrefix
    released: bool = field(default=False)


class ResidentPrefixes:
    """Digest -> blocks, in order of last use.

    Invariants: the blocks of all entries are handed out by the pool, each to one entry; an entry with a
    lease or a pin is never evicted. What a step asks is kept counted: it must not cost more the more is resident.
    """

    def __init__(self, blocks: BlockPool) -> None:
        self._blocks = blocks
        self._entries: OrderedDict[str, ResidentPrefix] = OrderedDict()  # least recently used first
        self._evicted: list[ResidentPrefix] = []
        self._num_blocks = 0
        self._num_evictable_blocks = 0
        self._tasks: tuple[str, ...] | None = ()  # None: to be made anew

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_blocks(self) -> int:
        """Blocks held by all resident prefixes."""
        return self._num_blocks

    @property
    def num_evictable_blocks(self) -> int:
        """Blocks of prefixes that nobody reads and nobody pinned."""
        return self._num_evictable_blocks

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks with a resident prefix, sorted; the same object until residency changes."""
        if self._tasks is None:
            self._tasks = tuple(sorted({entry.ref.task for entry in self._entries.values()}))
        return self._tasks

    def entries(self) -> tuple[ResidentPrefix, ...]:
        """All resident prefixes, least recently used first."""
        return tuple(self._entries.values())

    def reserve(self, ref: PrefixRef) -> ResidentPrefix:
        """Takes blocks for `ref`; the caller has made room and has the runner write them this step."""
        assert ref.digest not in self._entries, "a prefix is resident once"
        block_ids = self._blocks.allocate(self._blocks.blocks_for(ref.num_virtual_tokens))
        entry = ResidentPrefix(ref, tuple(block_ids))
        self._entries[ref.digest] = entry
        self._num_blocks += len(block_ids)
        self._num_evictable_blocks += len(block_ids)
        self._tasks = None
        return entry

    def acquire(self, digest: str) -> PrefixLease:
        """A lease on a resident prefix, which thereby is the most recently used."""
        entry = self._entries[digest]
        self._entries.move_to_end(digest)
        self._hold(entry, num_leases=entry.num_leases + 1)
        return PrefixLease(entry)

    def release(self, lease: PrefixLease) -> None:
        """Ends a lease. The prefix stays resident until room is needed."""
        assert not lease.released, "a lease is released once"
        lease.released = True
        entry = lease.resident
        self._hold(entry, num_leases=entry.num_leases - 1)
        if entry.retired and entry.evictable:
            self.evict(entry.ref.digest)

    def pin(self, digest: str) -> None:
        """Keeps a resident prefix whatever else needs room, even if it was to go before."""
        self._hold(self._entries[digest], pinned=True)
        self._entries[digest].retired = False

    def unpin(self, digest: str) -> None:
        """Lets the LRU decide again."""
        if digest in self._entries:
            self._hold(self._entries[digest], pinned=False)

    def evict(self, digest: str) -> None:
        """Frees the blocks of a prefix that nobody reads."""
        entry = self._entries[digest]
        assert entry.evictable, "a leased or pinned prefix is never evicted"
        del self._entries[digest]
        self._num_blocks -= len(entry.block_ids)
        self._num_evictable_blocks -= len(entry.block_ids)
        self._tasks = None
        self._blocks.free(entry.block_ids)
        self._evicted.append(entry)

    def take_evicted(self) -> tuple[ResidentPrefix, ...]:
        """What was evicted, for whatever reason, since this was last asked."""
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    def retire(self, digest: str) -> None:
        """Evicts a prefix now, or as soon as its last lease ends. A pin is lifted: nobody wants it."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        self._hold(entry, pinned=False)
        entry.retired = True
        if entry.evictable:
            self.evict(digest)

    def make_room(self, num_blocks: int) -> None:
        """Evicts least recently used prefixes until `num_blocks` are free or none can go."""
        if self._blocks.num_free >= num_blocks:
            return
        for entry in self.entries():
            if self._blocks.num_free >= num_blocks:
                break
            if entry.evictable:
                self.evict(entry.ref.digest)

    def _hold(
        self, entry: ResidentPrefix, *, num_leases: int | None = None, pinned: bool | None = None
    ) -> None:
        """Changes who holds a prefix, and with it how many blocks could go."""
        was_evictable = entry.evictable
        entry.num_leases = entry.num_leases if num_leases is None else num_leases
        entry.pinned = entry.pinned if pinned is None else pinned
        self._num_evictable_blocks += (entry.evictable - was_evictable) * len(entry.block_ids)

    def check_invariants(self) -> None:
        """Recomputes the class invariants from scratch; for tests and the debug loop."""
        entries = self._entries.values()
        assert self._num_blocks == sum(len(e.block_ids) for e in entries)
        assert self._num_evictable_blocks == sum(len(e.block_ids) for e in entries if e.evictable)
        assert self.tasks == tuple(sorted({e.ref.task for e in entries}))
        held = [b for entry in self._entries.values() for b in entry.block_ids]
        assert len(held) == len(set(held)), "a block belongs to two prefixes"
        for digest, entry in self._entries.items():
            assert digest == entry.ref.digest
            assert entry.num_leases >= 0
            assert not (entry.retired and entry.evictable), (
                "a retired prefix goes with its last lease"
            )
            wanted = self._blocks.blocks_for(entry.ref.num_virtual_tokens)
            assert len(entry.block_ids) == wanted, "a prefix holds exactly the blocks it needs"
