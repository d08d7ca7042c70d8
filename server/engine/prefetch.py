"""Loads prefixes from the store into host memory, off the engine thread.

Owns a few worker threads. `EngineCore` asks (at most once per prefix, the scheduler sees to that); each
answer is posted to the engine's inbox. A load that hangs or fails ends only those who wait for it; once as many hang as
there are threads, all loads from disk fail until one of them ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

from prefix_store.artifact import Prefix, as_it_is
from prefix_store.errors import PrefixStoreError
from server.host_threads import compute_alone
from server.types import PrefixRef, PrefixTier

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 0.25
PATIENCE_SECONDS: Final = 1.5
"""Requests of a cold task are told within 2 s that the store does not answer."""
SLOWEST_BYTES_PER_SECOND: Final = 2**25
STORE_HANGS: Final = "the store does not answer; try again"


@dataclass(frozen=True, slots=True)
class PrefixLoaded:
    """A prefix in the serving dtype, in host memory or staged on the device. `tier`: host if it was there already, else disk."""

    ref: PrefixRef
    prefix: Prefix
    tier: PrefixTier
    seconds: float


@dataclass(frozen=True, slots=True)
class PrefixLoadFailed:
    """Why a prefix could not be loaded, in a sentence for its requests."""

    ref: PrefixRef
    reason: str
    seconds: float


PrefixAnswer = PrefixLoaded | PrefixLoadFailed


class LoadResult(Protocol):
    """What a source returns: the tensors, and whether they were in host memory already."""

    @property
    def prefix(self) -> Prefix: ...

    @property
    def from_host(self) -> bool: ...


class PrefixSource(Protocol):
    """Where prefixes come from: `PrefixStore`, or a double in tests. `load` may block; it may never return."""

    def load(self, digest: str) -> LoadResult: ...

    def is_on_host(self, digest: str) -> bool: ...


@dataclass(slots=True, eq=False)
class _Load:
    """One load. `waited_seconds`: of late without a sign that it will end. `given_up`: its request was told so."""

    ref: PrefixRef
    asked: float
    future: Future[None] | None = None
    running: bool = False
    waited_seconds: float = 0.0
    given_up: bool = False


class Prefetcher:
    """Runs `source.load`, then `stage`, on worker threads and hands each answer to `post`.

    `stage` brings a prefix as near to its blocks as it gets without the engine thread. It may block. `bytes_per_token`: of a
    prefix; longer ones may take longer.

    A load that hangs can not be ended, so it is only given up: its requests fail, and others that ask for it meanwhile fail at
    once. It keeps its thread. What is in host memory has threads of its own, so that it never waits behind a disk.
    """

    def __init__(
        self,
        source: PrefixSource,
        post: Callable[[PrefixAnswer], None],
        stage: Callable[[Prefix], Prefix] = as_it_is,
        num_threads: int = 8,
        bytes_per_token: float = 0.0,
    ) -> None:
        self._source = source
        self._post = post
        self._stage = stage
        self._bytes_per_token = bytes_per_token
        self._threads = ThreadPoolExecutor(
            num_threads, thread_name_prefix="prefetch", initializer=compute_alone
        )
        self._host_threads = ThreadPoolExecutor(
            num_threads, thread_name_prefix="prefetch-host", initializer=compute_alone
        )
        self._lock = threading.Lock()  # guards what follows
        self._open: dict[str, _Load] = {}
        self._one_ended = False  # since the last look
        self._looked = time.monotonic()

    def request(self, ref: PrefixRef) -> None:
        """Starts a load; returns at once. Not again for the same prefix before its answer has come."""
        threads = self._host_threads if self._source.is_on_host(ref.digest) else self._threads
        with self._lock:
            hangs = ref.digest in self._open
            if not hangs:
                load = self._open[ref.digest] = _Load(ref, time.monotonic())
                load.future = threads.submit(self._load, load)
        if hangs:
            self._post(PrefixLoadFailed(ref, STORE_HANGS, 0.0))

    @property
    def is_waiting(self) -> bool:
        """Whether somebody waits for a load: `give_up_late` should then be called every `LOOK_SECONDS`."""
        with self._lock:
            return any(not load.given_up for load in self._open.values())

    def give_up_late(self, now: float) -> None:
        """Answers for the loads that take too long, as of monotonic `now`.

        One that waits for a thread is late if no other has ended for so long.
        """
        with self._lock:
            # A process that gets no processor must not blame its disk.
            elapsed, self._looked = min(now - self._looked, 2 * LOOK_SECONDS), now
            one_ended, self._one_ended = self._one_ended, False
            late = []
            for load in [x for x in self._open.values() if not x.given_up]:
                progresses = one_ended and not load.running
                load.waited_seconds = 0.0 if progresses else load.waited_seconds + elapsed
                if load.waited_seconds > self._patience(load.ref):
                    late.append(load)
                    self._give_up(load)
        for load in late:
            logger.error("prefix %s of task %s: %s", load.ref.digest, load.ref.task, STORE_HANGS)
            self._post(PrefixLoadFailed(load.ref, STORE_HANGS, now - load.asked))

    def close(self) -> None:
        """Takes no more requests; a load under way finishes on its own."""
        for threads in (self._threads, self._host_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _patience(self, ref: PrefixRef) -> float:
        size = ref.num_virtual_tokens * self._bytes_per_token
        return PATIENCE_SECONDS + size / SLOWEST_BYTES_PER_SECOND

    def _give_up(self, load: _Load) -> None:
        load.given_up = True
        if load.future is not None and load.future.cancel():  # it had no thread yet
            del self._open[load.ref.digest]

    def _load(self, load: _Load) -> None:
        with self._lock:
            load.running, load.waited_seconds = True, 0.0
        answer = self._answer(load.ref)
        with self._lock:
            del self._open[load.ref.digest]
            self._one_ended = True
            if load.given_up:
                return  # the store has it in host memory now, if there is room
        self._post(answer)

    def _answer(self, ref: PrefixRef) -> PrefixAnswer:
        started = time.monotonic()
        try:
            loaded = self._source.load(ref.digest)
            tier = PrefixTier.HOST if loaded.from_host else PrefixTier.DISK
            prefix = self._stage(loaded.prefix)
            return PrefixLoaded(ref, prefix, tier, time.monotonic() - started)
        except PrefixStoreError as error:
            logger.warning("prefix %s of task %s: %s", ref.digest, ref.task, error)
            return PrefixLoadFailed(ref, str(error), time.monotonic() - started)
        except Exception:
            logger.exception("prefix %s of task %s could not be loaded", ref.digest, ref.task)
            return PrefixLoadFailed(
                ref, "the prefix could not be loaded", time.monotonic() - started
            )
