"""Loads off the engine thread: every request is answered once, whatever the source does."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from prefix_store.artifact import Prefix, as_it_is
from prefix_store.errors import PrefixStoreError
from prefix_store.spec import PrefixManifest
from server.engine.prefetch import (
    LOOK_SECONDS,
    STORE_HANGS,
    Prefetcher,
    PrefixAnswer,
    PrefixLoaded,
    PrefixLoadFailed,
    PrefixSource,
)
from server.types import PrefixRef, PrefixTier

REF = PrefixRef("task", 1, "sha256:a", 1, 1)
MANIFEST = PrefixManifest(num_virtual_tokens=1, k_space="none", model_type="fake")


@dataclass
class Source:
    from_host: bool = False
    error: Exception | None = None
    thread: str = ""

    def load(self, digest: str) -> _Loaded:
        self.thread = threading.current_thread().name
        if self.error is not None:
            raise self.error
        return _Loaded(Prefix(digest, MANIFEST, (), ()), self.from_host)

    def is_on_host(self, digest: str) -> bool:
        return self.from_host


@dataclass(frozen=True)
class _Loaded:
    prefix: Prefix
    from_host: bool


def answer_of(source: PrefixSource, stage: Callable[[Prefix], Prefix] = as_it_is) -> PrefixAnswer:
    answers: queue.Queue[PrefixAnswer] = queue.Queue()
    prefetcher = Prefetcher(source, answers.put, stage)
    prefetcher.request(REF)
    try:
        return answers.get(timeout=10)
    finally:
        prefetcher.close()


@pytest.mark.parametrize(("from_host", "tier"), [(True, PrefixTier.HOST), (False, PrefixTier.DISK)])
def test_a_loaded_prefix_is_posted_with_the_tier_it_came_from(
    from_host: bool, tier: PrefixTier
) -> None:
    source = Source(from_host)
    answer = answer_of(source)

    assert isinstance(answer, PrefixLoaded)
    assert (answer.ref, answer.prefix.digest, answer.tier) == (REF, REF.digest, tier)
    assert source.thread.startswith("prefetch")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PrefixStoreError("the blob is damaged"), "the blob is damaged"),
        (OSError("/secret/path"), "the prefix could not be loaded"),
    ],
)
def test_a_failure_is_an_answer_and_foreign_errors_are_not_quoted(
    error: Exception, reason: str
) -> None:
    answer = answer_of(Source(error=error))

    assert isinstance(answer, PrefixLoadFailed)
    assert answer.reason == reason


def test_what_was_loaded_is_staged_off_the_engine_thread_before_it_is_posted() -> None:
    staged = Prefix("sha256:staged", MANIFEST, (), ())
    threads = []

    def stage(prefix: Prefix) -> Prefix:
        assert prefix.digest == REF.digest
        threads.append(threading.current_thread().name)
        return staged

    answer = answer_of(Source(), stage)

    assert isinstance(answer, PrefixLoaded)
    assert answer.prefix is staged
    assert [name.startswith("prefetch") for name in threads] == [True]


def test_a_prefix_that_can_not_be_staged_is_an_answer_too() -> None:
    def stage(_: Prefix) -> Prefix:
        raise RuntimeError("CUDA error: the bus")

    answer = answer_of(Source(), stage)

    assert isinstance(answer, PrefixLoadFailed)
    assert answer.reason == "the prefix could not be loaded"


def test_requesting_returns_at_once_and_one_slow_load_does_not_hold_up_the_next() -> None:
    gate = threading.Event()
    answers: queue.Queue[PrefixAnswer] = queue.Queue()

    class Slow(Source):
        def load(self, digest: str) -> _Loaded:
            assert digest == "sha256:fast" or gate.wait(10)
            return super().load(digest)

    prefetcher = Prefetcher(Slow(), answers.put)
    prefetcher.request(REF)
    prefetcher.request(PrefixRef("task", 2, "sha256:fast", 1, 1))

    assert answers.get(timeout=10).ref.digest == "sha256:fast"
    gate.set()
    assert answers.get(timeout=10).ref is REF
    prefetcher.close()


class Hanging(Source):
    """Digests that say so hang until `gate` opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.began = threading.Event()
        self.num_loads = 0

    def load(self, digest: str) -> _Loaded:
        self.num_loads += 1
        self.began.set()
        assert "hangs" not in digest or self.gate.wait(20)
        return super().load(digest)

    def is_on_host(self, digest: str) -> bool:
        return "host" in digest


def ref(name: str, num_virtual_tokens: int = 1) -> PrefixRef:
    return PrefixRef("task", 1, f"sha256:{name}", num_virtual_tokens, 1)


def pass_time(prefetcher: Prefetcher, seconds: float, start: float = 0.0) -> float:
    """Looks every `LOOK_SECONDS` of a clock that does not wait; returns when that ended."""
    now = start or time.monotonic()
    for _ in range(round(seconds / LOOK_SECONDS)):
        now += LOOK_SECONDS
        prefetcher.give_up_late(now)
    return now


def test_a_load_that_hangs_is_given_up_within_two_seconds_and_asked_for_again_in_vain() -> None:
    source, answers = Hanging(), queue.Queue[PrefixAnswer]()
    prefetcher = Prefetcher(source, answers.put)
    prefetcher.request(ref("hangs"))
    assert prefetcher.is_waiting
    assert source.began.wait(10)

    now = pass_time(prefetcher, 1.0)
    assert answers.empty()
    pass_time(prefetcher, 1.0, now)
    first = answers.get_nowait()
    assert isinstance(first, PrefixLoadFailed)
    assert (first.reason, prefetcher.is_waiting) == (STORE_HANGS, False)

    prefetcher.request(ref("hangs"))
    assert isinstance(answers.get_nowait(), PrefixLoadFailed), "at once, and without a thread"
    assert source.num_loads == 1

    source.gate.set()
    for _ in range(1000):
        prefetcher.request(ref("hangs"))
        if isinstance(answers.get(timeout=10), PrefixLoaded):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("the store answers again, and nobody is told")
    assert answers.empty(), "the answer that nobody waited for any more is dropped"
    prefetcher.close()


def test_when_every_thread_hangs_what_is_in_host_memory_is_still_served() -> None:
    source, answers = Hanging(), queue.Queue[PrefixAnswer]()
    prefetcher = Prefetcher(source, answers.put, num_threads=2)
    for number in range(3):  # the third waits for a thread
        prefetcher.request(ref(f"hangs-{number}"))

    prefetcher.request(ref("host"))
    assert isinstance(answers.get(timeout=10), PrefixLoaded)
    pass_time(prefetcher, 3.0)

    failed = {answers.get(timeout=10).ref.digest for _ in range(3)}
    assert failed == {f"sha256:hangs-{number}" for number in range(3)}
    source.gate.set()
    prefetcher.close()


def test_who_waits_for_a_thread_is_not_late_while_others_end() -> None:
    source, answers = Hanging(), queue.Queue[PrefixAnswer]()
    prefetcher = Prefetcher(source, answers.put, num_threads=1)
    prefetcher.request(ref("hangs", num_virtual_tokens=100))
    prefetcher._bytes_per_token = 2.0**25  # 100 s at the slowest
    prefetcher.request(ref("next"))
    now = time.monotonic()
    for _ in range(20):
        prefetcher._one_ended = True  # as if others did
        now += LOOK_SECONDS
        prefetcher.give_up_late(now)

    assert answers.empty()
    source.gate.set()
    assert {answers.get(timeout=10).ref.digest for _ in range(2)} == {"sha256:hangs", "sha256:next"}
    prefetcher.close()


def test_a_process_that_gets_no_processor_does_not_blame_its_store() -> None:
    source, answers = Hanging(), queue.Queue[PrefixAnswer]()
    prefetcher = Prefetcher(source, answers.put)
    prefetcher.request(ref("hangs"))
    prefetcher.give_up_late(time.monotonic() + 3600)

    assert answers.empty()
    source.gate.set()
    assert isinstance(answers.get(timeout=10), PrefixLoaded)
    prefetcher.close()
