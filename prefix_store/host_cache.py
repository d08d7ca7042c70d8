"""The host tier: prefixes in host memory, ready for the device, least recently used out first.

Thread-safe; `store` calls it from whichever thread loads (the server's prefetch workers). The lock is never
held while a load runs, so a slow disk delays only those who wait for that very digest. Knows nothing of
torch or files: it is given a function that loads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from prefix_store.lru import LRUCache


class Sized(Protocol):
    """What the cache must know of a value."""

    @property
    def num_bytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


@dataclass(frozen=True, slots=True)
class HostCacheStats:
    """Counters since start (`hits`, `misses`, `evictions`) and the present fill.

    A miss is a `get` that had to wait for a load, its own or another thread's.
    """

    num_bytes: int
    capacity_bytes: int
    num_entries: int
    hits: int
    misses: int
    evictions: int


class HostCache(Generic[V]):
    """digest -> value, loaded at most once at a time per digest.

    A value larger than the whole budget is handed out and not kept.
    """

    def __init__(self, capacity_bytes: int, load: Callable[[str], V]) -> None:
        self._load = load
        self._lock = threading.Lock()  # guards everything below
        self._lru: LRUCache[str, V] = LRUCache(capacity_bytes)
        self._loading: dict[str, Future[V]] = {}
        self._unwanted: set[str] = set()  # being loaded, for those who wait only
        self._hits = 0
        self._misses = 0
        self._evictions = 0

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._lru

    def get(self, digest: str) -> tuple[V, bool]:
        """The value, and whether it was in memory already. Blocks for the load.

        What the load raises is raised to all who wait for it; the next call tries again.
        """
        with self._lock:
            value = self._lru.get(digest)
            if value is not None:
                self._hits += 1
                return value, True
            self._misses += 1
            pending = self._loading.get(digest)
            if pending is None:
                mine = self._loading[digest] = Future()
        if pending is not None:
            return pending.result(), False
        return self._load_for_all(digest, mine), False

    def discard(self, digest: str) -> bool:
        """Do not keep this value; a load under way still serves those who wait for it. True: it was held."""
        with self._lock:
            if digest in self._loading:
                self._unwanted.add(digest)
            return self._lru.remove(digest) is not None

    def sizes(self) -> dict[str, int]:
        """Bytes of each value that is held, the least recently used first."""
        with self._lock:
            return self._lru.sizes()

    def stats(self) -> HostCacheStats:
        """A consistent snapshot."""
        with self._lock:
            return HostCacheStats(
                num_bytes=self._lru.used_bytes,
                capacity_bytes=self._lru.capacity_bytes,
                num_entries=len(self._lru),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )

    def check_invariants(self) -> None:
        """For tests: the sums are right, and nothing is both held and being loaded."""
        with self._lock:
            self._lru.check_invariants()
            assert not self._loading.keys() & set(self._lru.keys())
            assert self._unwanted <= self._loading.keys()

    def _load_for_all(self, digest: str, future: Future[V]) -> V:
        try:
            value = self._load(digest)
        except BaseException as error:
            with self._lock:
                del self._loading[digest]
                self._unwanted.discard(digest)
            future.set_exception(error)
            raise
        with self._lock:
            del self._loading[digest]
            if digest in self._unwanted:
                self._unwanted.discard(digest)
            else:
                self._evictions += len(self._lru.put(digest, value, value.num_bytes))
        future.set_result(value)
        return value
