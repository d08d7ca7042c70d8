"""The host tier: single flight, retries, counters, and a twin for its contents."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from dataclasses import dataclass

import pytest

from prefix_store.errors import PrefixUnavailable
from prefix_store.host_cache import HostCache


@dataclass(frozen=True)
class Blob:
    name: str
    num_bytes: int


class Disk:
    """Loads blobs, counts the loads, and can be made to wait or to fail."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.broken: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)

    def load(self, digest: str) -> Blob:
        self.loads.append(digest)
        self.started.release()
        assert self.gate.wait(10)
        if digest in self.broken:
            raise PrefixUnavailable(digest)
        return Blob(digest, len(digest))


def in_threads(
    count: int, cache: HostCache[Blob], digest: str
) -> tuple[list[threading.Thread], list[object]]:
    """Threads that each ask for `digest`, and the list that their outcomes go to."""
    outcomes: list[object] = []

    def ask() -> None:
        try:
            outcomes.append(cache.get(digest))
        except PrefixUnavailable as error:
            outcomes.append(error)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, outcomes


def wait_for_misses(cache: HostCache[Blob], count: int) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if cache.stats().misses >= count:
            return
        pause.wait(0.005)
    raise AssertionError(f"{cache.stats().misses} threads arrived, expected {count}")


@pytest.mark.parametrize("seed", range(5))
def test_random_use_agrees_with_the_twin(seed: int) -> None:
    rng = random.Random(seed)
    disk = Disk()
    cache = HostCache(20, disk.load)
    twin: OrderedDict[str, int] = OrderedDict()
    hits = misses = evictions = 0
    for _ in range(500):
        digest = "x" * rng.choice([1, 2, 3, 5, 8, 13, 21])
        expected_hit = digest in twin
        assert (digest in cache) == expected_hit
        value, from_host = cache.get(digest)
        assert value == Blob(digest, len(digest))
        assert from_host == expected_hit
        if expected_hit:
            hits += 1
            twin.move_to_end(digest)
        else:
            misses += 1
            if len(digest) <= 20:  # larger than the whole budget: handed out, not kept
                while sum(twin.values()) + len(digest) > 20:
                    twin.popitem(last=False)
                    evictions += 1
                twin[digest] = len(digest)
        cache.check_invariants()
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.evictions) == (hits, misses, evictions)
        assert (stats.num_bytes, stats.num_entries) == (sum(twin.values()), len(twin))
    assert len(disk.loads) == misses


def test_threads_that_want_one_digest_share_one_load() -> None:
    disk = Disk()
    disk.gate.clear()
    cache = HostCache(100, disk.load)
    threads, outcomes = in_threads(8, cache, "abc")
    wait_for_misses(cache, 8)
    disk.gate.set()
    for thread in threads:
        thread.join()
    assert disk.loads == ["abc"]
    assert outcomes == [(Blob("abc", 3), False)] * 8
    assert cache.get("abc") == (Blob("abc", 3), True)


def test_a_failed_load_is_told_to_all_who_wait_and_tried_again_by_the_next() -> None:
    disk = Disk()
    disk.gate.clear()
    disk.broken.add("abc")
    cache = HostCache(100, disk.load)
    threads, outcomes = in_threads(4, cache, "abc")
    wait_for_misses(cache, 4)
    disk.gate.set()
    for thread in threads:
        thread.join()
    assert disk.loads == ["abc"]
    assert [type(outcome) for outcome in outcomes] == [PrefixUnavailable] * 4
    assert "abc" not in cache
    disk.broken.clear()
    assert cache.get("abc") == (Blob("abc", 3), False)
    cache.check_invariants()


def test_a_slow_load_delays_no_other_digest() -> None:
    disk = Disk()
    cache = HostCache(100, disk.load)
    cache.get("quick")
    disk.gate.clear()
    threads, _ = in_threads(1, cache, "slow")
    wait_for_misses(cache, 2)
    assert cache.get("quick") == (Blob("quick", 5), True)
    assert "slow" not in cache
    disk.gate.set()
    threads[0].join()
    assert "slow" in cache


def test_a_value_larger_than_the_budget_evicts_nothing() -> None:
    cache = HostCache(5, Disk().load)
    cache.get("abc")
    assert cache.get("abcdef") == (Blob("abcdef", 6), False)
    assert "abc" in cache
    assert "abcdef" not in cache


def test_what_is_discarded_while_it_is_loaded_serves_who_waits_and_is_not_kept() -> None:
    disk = Disk()
    cache = HostCache(20, disk.load)
    disk.gate.clear()
    threads, outcomes = in_threads(3, cache, "xx")
    wait_for_misses(cache, 3)
    assert not cache.discard("xx")
    disk.gate.set()
    for thread in threads:
        thread.join()
    assert outcomes == [(Blob("xx", 2), False)] * 3
    assert "xx" not in cache
    cache.check_invariants()
    cache.get("xx")
    assert cache.sizes() == {"xx": 2}
    assert cache.discard("xx")
    assert (cache.sizes(), cache.stats().num_bytes, cache.stats().evictions) == ({}, 0, 0)


def test_a_discarded_load_that_fails_leaves_no_mark() -> None:
    disk = Disk()
    cache = HostCache(20, disk.load)
    disk.broken.add("xx")
    disk.gate.clear()
    threads, _ = in_threads(1, cache, "xx")
    wait_for_misses(cache, 1)
    cache.discard("xx")
    disk.gate.set()
    threads[0].join()
    disk.broken.clear()
    cache.check_invariants()
    assert cache.get("xx")[0] == Blob("xx", 2)
    assert "xx" in cache
