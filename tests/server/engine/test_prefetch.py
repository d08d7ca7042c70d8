"""Loads off the engine thread: every request is answered once, whatever the source does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from prefix_store.artifact import Prefix, as_it_is
from prefix_store.errors import PrefixStoreError
from prefix_store.spec import PrefixManifest
from server.engine.prefetch import (
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
