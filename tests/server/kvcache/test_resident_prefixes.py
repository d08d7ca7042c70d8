"""Residency against a slow twin, and the rules one by one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from server.kvcache.block_pool import BlockPool
from server.kvcache.resident_prefixes import PrefixLease, ResidentPrefixes
from server.types import PrefixRef

BLOCK_SIZE = 4


def made_room(prefixes: ResidentPrefixes, num_blocks: int) -> list[str]:
    """Digests that left for `num_blocks` to be free."""
    prefixes.take_evicted()
    prefixes.make_room(num_blocks)
    return [entry.ref.digest for entry in prefixes.take_evicted()]


def ref(name: str, num_virtual_tokens: int = BLOCK_SIZE, task: str = "task") -> PrefixRef:
    return PrefixRef(task, 1, f"sha256:{name}", num_virtual_tokens, num_virtual_tokens)


def make(num_blocks: int = 11) -> tuple[BlockPool, ResidentPrefixes]:
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    return pool, ResidentPrefixes(pool)


@dataclass
class Twin:
    """The rules as one would explain them: a list in order of use, and plain records."""

    capacity: int
    records: list[dict[str, int | bool | str]] = field(default_factory=list)

    @property
    def num_free(self) -> int:
        return self.capacity - sum(int(r["blocks"]) for r in self.records)

    def find(self, digest: str) -> dict[str, int | bool | str]:
        return next(r for r in self.records if r["digest"] == digest)

    def sweep(self) -> None:
        """A retired record goes once nobody reads or pins it."""
        self.records = [
            r for r in self.records if not (r["retired"] and not r["leases"] and not r["pinned"])
        ]

    def make_room(self, num_blocks: int) -> list[str]:
        gone = []
        for r in list(self.records):
            if self.num_free < num_blocks and not r["leases"] and not r["pinned"]:
                self.records.remove(r)
                gone.append(str(r["digest"]))
        return gone


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_agree_with_a_slow_twin(seed: int) -> None:
    rng = random.Random(seed)
    pool, prefixes = make(num_blocks=rng.randint(5, 25))
    twin = Twin(pool.capacity)
    leases: list[PrefixLease] = []
    refs = [ref(str(i), rng.randint(1, 12)) for i in range(8)]
    for _ in range(400):
        chosen = rng.choice(refs)
        digest, size = chosen.digest, pool.blocks_for(chosen.num_virtual_tokens)
        match rng.randrange(7):
            case 0 if digest not in prefixes and size <= pool.num_free:
                prefixes.reserve(chosen)
                twin.records.append(
                    {
                        "digest": digest,
                        "blocks": size,
                        "leases": 0,
                        "pinned": False,
                        "retired": False,
                    }
                )
            case 1 if digest in prefixes:
                leases.append(prefixes.acquire(digest))
                record = twin.find(digest)
                record["leases"] = int(record["leases"]) + 1
                twin.records.remove(record)
                twin.records.append(record)
            case 2 if leases:
                lease = leases.pop(rng.randrange(len(leases)))
                prefixes.release(lease)
                record = twin.find(lease.resident.ref.digest)
                record["leases"] = int(record["leases"]) - 1
            case 3 if digest in prefixes:
                prefixes.pin(digest)
                twin.find(digest).update(pinned=True, retired=False)
            case 4:
                prefixes.unpin(digest)
                if any(r["digest"] == digest for r in twin.records):
                    twin.find(digest)["pinned"] = False
            case 5:
                prefixes.retire(digest)
                if any(r["digest"] == digest for r in twin.records):
                    twin.find(digest).update(pinned=False, retired=True)
            case 6:
                wanted = rng.randint(0, 6)
                assert made_room(prefixes, wanted) == twin.make_room(wanted)
        twin.sweep()
        prefixes.check_invariants()
        pool.check_invariants()
        assert [e.ref.digest for e in prefixes.entries()] == [r["digest"] for r in twin.records]
        assert pool.num_free == twin.num_free
        assert prefixes.num_blocks == pool.num_used
        assert prefixes.num_evictable_blocks == sum(
            int(r["blocks"]) for r in twin.records if not r["leases"] and not r["pinned"]
        )
        assert len(prefixes) == len(twin.records)


def test_the_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    _pool, prefixes = make(num_blocks=4)
    for name in "abc":
        prefixes.reserve(ref(name))
    prefixes.release(prefixes.acquire("sha256:a"))

    assert made_room(prefixes, 1) == ["sha256:b"]
    assert made_room(prefixes, 1) == [], "there was room already"


def test_a_leased_or_pinned_prefix_is_never_evicted() -> None:
    _pool, prefixes = make(num_blocks=3)
    prefixes.reserve(ref("leased"))
    prefixes.reserve(ref("pinned"))
    prefixes.acquire("sha256:leased")
    prefixes.pin("sha256:pinned")

    assert made_room(prefixes, 2) == []
    for name in ("leased", "pinned"):
        with pytest.raises(AssertionError, match="never evicted"):
            prefixes.evict(f"sha256:{name}")


def test_a_lease_is_released_once() -> None:
    _pool, prefixes = make()
    prefixes.reserve(ref("a"))
    lease = prefixes.acquire("sha256:a")
    prefixes.release(lease)

    with pytest.raises(AssertionError, match="released once"):
        prefixes.release(lease)


def test_a_prefix_is_resident_once() -> None:
    _pool, prefixes = make()
    prefixes.reserve(ref("a"))

    with pytest.raises(AssertionError, match="resident once"):
        prefixes.reserve(ref("a"))


def test_a_retired_prefix_goes_with_its_last_lease_and_not_before() -> None:
    pool, prefixes = make()
    prefixes.reserve(ref("a"))
    leases = [prefixes.acquire("sha256:a") for _ in range(2)]
    prefixes.retire("sha256:a")
    prefixes.release(leases[0])
    assert "sha256:a" in prefixes

    prefixes.release(leases[1])
    assert "sha256:a" not in prefixes
    assert pool.num_used == 0


def test_retiring_lifts_a_pin_and_forgets_an_unknown_digest() -> None:
    pool, prefixes = make()
    prefixes.reserve(ref("a"))
    prefixes.pin("sha256:a")
    prefixes.retire("sha256:unknown")
    prefixes.retire("sha256:a")

    assert pool.num_used == 0


def test_two_versions_of_a_task_are_two_prefixes() -> None:
    """A key by name would give running requests the blocks of the new version."""
    _pool, prefixes = make()
    old, new = prefixes.reserve(ref("old")), prefixes.reserve(ref("new"))

    assert not set(old.block_ids) & set(new.block_ids)
    assert prefixes.acquire("sha256:old").resident is old


def test_unpinning_lets_the_lru_decide_again() -> None:
    _pool, prefixes = make(num_blocks=2)
    prefixes.reserve(ref("a"))
    prefixes.pin("sha256:a")
    prefixes.unpin("sha256:a")
    prefixes.unpin("sha256:unknown")

    assert made_room(prefixes, 1) == ["sha256:a"]


def test_a_pin_that_comes_after_the_order_to_evict_cancels_it() -> None:
    _pool, prefixes = make()
    prefixes.reserve(ref("a"))
    lease = prefixes.acquire("sha256:a")
    prefixes.retire("sha256:a")
    prefixes.pin("sha256:a")
    prefixes.release(lease)
    prefixes.unpin("sha256:a")

    prefixes.check_invariants()
    assert "sha256:a" in prefixes
