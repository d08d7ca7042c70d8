"""Loads prefixes from the store into host memory, off the engine thread.

Owns a few worker threads. `EngineCore` asks (at most once per prefix, the scheduler sees to that); each
answer is posted to the engine's inbox. A load that hangs or fails delays only those who wait for it, as
long as fewer hang than there are threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from prefix_store.artifact import Prefix, as_it_is
from prefix_store.errors import PrefixStoreError
from server.host_threads import compute_alone
from server.types import PrefixRef, PrefixTier

logger = logging.getLogger(__name__)


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
    """Where prefixes come from: `PrefixStore`, or a double in tests. `load` may block."""

    def load(self, digest: str) -> LoadResult: ...


class Prefetcher:
    """Runs `source.load`, then `stage`, on worker threads and hands each answer to `post`.

    `stage` brings a prefix as near to its blocks as it gets without the engine thread. It may block.
    """

    def __init__(
        self,
        source: PrefixSource,
        post: Callable[[PrefixAnswer], None],
        stage: Callable[[Prefix], Prefix] = as_it_is,
        num_threads: int = 8,
    ) -> None:
        self._source = source
        self._post = post
        self._stage = stage
        self._threads = ThreadPoolExecutor(
            num_threads, thread_name_prefix="prefetch", initializer=compute_alone
        )

    def request(self, ref: PrefixRef) -> None:
        """Starts a load; returns at once."""
        self._threads.submit(self._load, ref)

    def close(self) -> None:
        """Takes no more requests; a load under way finishes on its own."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load(self, ref: PrefixRef) -> None:
        started = time.monotonic()
        try:
            loaded = self._source.load(ref.digest)
            tier = PrefixTier.HOST if loaded.from_host else PrefixTier.DISK
            prefix = self._stage(loaded.prefix)
            answer: PrefixAnswer = PrefixLoaded(ref, prefix, tier, time.monotonic() - started)
        except PrefixStoreError as error:
            logger.warning("prefix %s of task %s: %s", ref.digest, ref.task, error)
            answer = PrefixLoadFailed(ref, str(error), time.monotonic() - started)
        except Exception:
            logger.exception("prefix %s of task %s could not be loaded", ref.digest, ref.task)
            answer = PrefixLoadFailed(
                ref, "the prefix could not be loaded", time.monotonic() - started
            )
        self._post(answer)
