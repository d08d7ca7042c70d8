"""Which blobs go and which stay: against a twin, and where two threads want the opposite."""

from __future__ import annotations

import functools
import random
import threading
from collections import Counter

import pytest

from prefix_store.retention import Retention

DIGESTS = "abc"


class Place:
    """Blobs and the names that versions give them, open to the test."""

    def __init__(self) -> None:
        self.named: set[str] = set(DIGESTS)
        self.removed: list[str] = []
        self.retention = Retention(self.named.__contains__, self.removed.append)


@pytest.mark.parametrize("seed", range(6))
def test_a_blob_goes_exactly_when_it_is_neither_named_nor_held(seed: int) -> None:
    rng = random.Random(seed)
    place = Place()
    retention, holds = place.retention, Counter[str]()
    for _ in range(400):
        digest = rng.choice(DIGESTS)
        place.removed.clear()
        match rng.choice(["name", "unname", "hold", "release", "free"]):
            case "name":
                place.named.add(digest)
            case "unname":
                place.named.discard(digest)
            case "hold":
                wanted = digest in place.named
                assert (
                    retention.hold(digest, functools.partial(place.named.__contains__, digest))
                    == wanted
                )
                holds[digest] += wanted
            case "release" if holds[digest]:
                holds[digest] -= 1
                worth_a_try = retention.release(digest)
                assert not (worth_a_try and holds[digest])
                if worth_a_try:
                    assert retention.free(digest) == (digest not in place.named)
            case "free":
                goes = digest not in place.named and not holds[digest]
                assert retention.free(digest) == goes
                assert place.removed == [digest] * goes
        assert [retention.num_holds(d) for d in DIGESTS] == [holds[d] for d in DIGESTS]


def test_the_last_release_of_a_blob_that_was_to_go_says_so() -> None:
    place = Place()
    retention = place.retention
    retention.hold("a")
    retention.hold("a")
    place.named.clear()
    assert not retention.free("a")
    assert [retention.release("a"), retention.release("a")] == [False, True]
    assert retention.free("a")
    assert place.removed == ["a"]


def test_who_would_name_a_blob_that_is_being_removed_waits_for_its_end() -> None:
    removing, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def remove(digest: str) -> None:
        removing.set()
        assert go_on.wait(10)
        order.append(f"removed {digest}")

    retention = Retention(lambda _: False, remove)

    def upload() -> None:
        with retention.naming("a"):
            order.append("published")

    freeing = threading.Thread(target=retention.free, args=("a",))
    freeing.start()
    assert removing.wait(10)
    assert not retention.free("a"), "one removes it already"
    uploading = threading.Thread(target=upload)
    uploading.start()
    uploading.join(0.05)
    assert uploading.is_alive()
    retention.hold("b")
    go_on.set()
    freeing.join()
    uploading.join()
    assert order == ["removed a", "published"]


def test_a_failed_upload_takes_its_blob_with_it_unless_others_want_it() -> None:
    place = Place()
    for named in (False, True):
        place.named = {"a"} if named else set()
        removed: list[str] = []
        retention = Retention(place.named.__contains__, removed.append)
        with pytest.raises(OSError, match="full"), retention.naming("a"):
            raise OSError("full")
        assert removed == ([] if named else ["a"])
        assert retention.num_holds("a") == 0
