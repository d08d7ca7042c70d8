"""`LRUCache`: which values stay, given a budget in bytes. Pure bookkeeping; reads no clock, frees nothing.

Not thread-safe: its owner (`host_cache`) holds a lock. Values leave only through what `put` and
`remove` return, so the owner always learns what it no longer has.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    num_bytes: int
    num_pins: int = 0


class LRUCache(Generic[K, V]):
    """Values by key, least recently used first out.

    Invariants: `used_bytes` is the sum over entries and never exceeds `capacity_bytes`; a pinned entry
    stays until it is unpinned as often as it was pinned.
    """

    def __init__(self, capacity_bytes: int) -> None:
        assert capacity_bytes >= 0
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.pinned_bytes = 0
        self._entries: dict[K, _Entry[V]] = {}  # in order of use, the least recent first

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        """Whether `key` is held; does not count as a use."""
        return key in self._entries

    def keys(self) -> list[K]:
        """All keys, the least recently used first."""
        return list(self._entries)

    def sizes(self) -> dict[K, int]:
        """Bytes of each value, the least recently used first."""
        return {key: entry.num_bytes for key, entry in self._entries.items()}

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recently used; None when it is not held."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._entries[key] = entry
        return entry.value

    def fits(self, num_bytes: int) -> bool:
        """Whether `put` of a new key of this size would keep it."""
        return num_bytes <= self.capacity_bytes - self.pinned_bytes

    def put(self, key: K, value: V, num_bytes: int) -> list[tuple[K, V]]:
        """Keep a value under a new key, as the most recently used; returns what had to leave for it.

        A value that can not fit beside the pinned ones is not kept, and nothing leaves.
        """
        assert key not in self._entries, "a key is put once; values are immutable"
        assert num_bytes >= 0
        if not self.fits(num_bytes):
            return []
        evicted = self._make_room(num_bytes)
        self._entries[key] = _Entry(value, num_bytes)
        self.used_bytes += num_bytes
        return evicted

    def remove(self, key: K) -> V | None:
        """Take an unpinned value out; None when it is not held."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        assert not entry.num_pins, "a pinned value can not be removed"
        del self._entries[key]
        self.used_bytes -= entry.num_bytes
        return entry.value

    def pin(self, key: K) -> None:
        """Protect a held value from eviction until the matching `unpin`. Pins count."""
        entry = self._entries[key]
        if not entry.num_pins:
            self.pinned_bytes += entry.num_bytes
        entry.num_pins += 1

    def unpin(self, key: K) -> None:
        """Undo one `pin`."""
        entry = self._entries[key]
        assert entry.num_pins, "unpin without a pin"
        entry.num_pins -= 1
        if not entry.num_pins:
            self.pinned_bytes -= entry.num_bytes

    def check_invariants(self) -> None:
        """Recompute every sum from scratch; for tests."""
        entries = self._entries.values()
        assert self.used_bytes == sum(entry.num_bytes for entry in entries)
        assert self.pinned_bytes == sum(entry.num_bytes for entry in entries if entry.num_pins)
        assert all(entry.num_pins >= 0 and entry.num_bytes >= 0 for entry in entries)
        assert self.pinned_bytes <= self.used_bytes <= self.capacity_bytes

    def _make_room(self, num_bytes: int) -> list[tuple[K, V]]:
        excess = self.used_bytes + num_bytes - self.capacity_bytes
        victims = []
        for key, entry in self._entries.items():
            if excess <= 0:
                break
            if not entry.num_pins:
                victims.append((key, entry.value))
                excess -= entry.num_bytes
        for key, _ in victims:
            self.remove(key)
        return victims
