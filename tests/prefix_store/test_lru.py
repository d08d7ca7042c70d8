"""The LRU against a slow, obvious twin."""

from __future__ import annotations

import random

import pytest

from prefix_store.lru import LRUCache


class ListLRU:
    """The same policy as a list of [key, size, pins], the least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: list[list[int]] = []

    def find(self, key: int) -> list[int] | None:
        return next((item for item in self.items if item[0] == key), None)

    def get(self, key: int) -> int | None:
        item = self.find(key)
        if item is None:
            return None
        self.items.remove(item)
        self.items.append(item)
        return key

    def put(self, key: int, size: int) -> list[int]:
        evicted: list[int] = []
        if sum(item[1] for item in self.items if item[2]) + size > self.capacity:
            return evicted
        while sum(item[1] for item in self.items) + size > self.capacity:
            victim = next(item for item in self.items if not item[2])
            self.items.remove(victim)
            evicted.append(victim[0])
        self.items.append([key, size, 0])
        return evicted


@pytest.mark.parametrize("seed", range(10))
def test_random_operations_agree_with_the_twin(seed: int) -> None:
    rng = random.Random(seed)
    cache: LRUCache[int, int] = LRUCache(100)
    twin = ListLRU(100)
    for _ in range(1000):
        key = rng.randrange(12)
        item = twin.find(key)
        match rng.choice(["get", "put", "put", "pin", "unpin", "remove"]):
            case "get":
                assert cache.get(key) == twin.get(key)
            case "put" if item is None:
                size = rng.choice([0, 1, 10, 30, 60, 101])
                expected_to_fit = cache.fits(size)
                assert [k for k, _ in cache.put(key, key, size)] == twin.put(key, size)
                assert expected_to_fit == (key in cache)
            case "pin" if item is not None:
                cache.pin(key)
                item[2] += 1
            case "unpin" if item is not None and item[2]:
                cache.unpin(key)
                item[2] -= 1
            case "remove" if item is None or not item[2]:
                assert cache.remove(key) == (None if item is None else key)
                twin.items = [other for other in twin.items if other is not item]
        cache.check_invariants()
        assert cache.keys() == [item[0] for item in twin.items]
        assert len(cache) == len(twin.items)


def test_misuse_is_our_own_bug() -> None:
    cache: LRUCache[str, int] = LRUCache(10)
    cache.put("a", 1, 5)
    with pytest.raises(AssertionError, match="put once"):
        cache.put("a", 2, 5)
    with pytest.raises(AssertionError, match="without a pin"):
        cache.unpin("a")
    cache.pin("a")
    with pytest.raises(AssertionError, match="pinned"):
        cache.remove("a")
    cache.check_invariants()
