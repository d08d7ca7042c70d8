"""Which blobs may go: a blob stays while a version names it, or while somebody holds it.

Holders are requests, from the moment their version is chosen until they end, and uploads that are about to
name a blob. Called by `store` and `upload` on any thread. The lock is held for bookkeeping only, never while
a file is removed; whoever wants to hold a blob that is just being removed waits for that to end.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator


class Retention:
    """Counts holds by digest, and frees what is neither named nor held.

    `is_named`: whether a version names the digest; slow is fine, it is asked only for blobs that may go.
    `remove`: deletes the blob from every tier of the store; blocks.
    Invariants: a digest that is being removed is not held; one that is named or held is not removed.
    """

    def __init__(self, is_named: Callable[[str], bool], remove: Callable[[str], None]) -> None:
        self._is_named = is_named
        self._remove = remove
        self._changed = threading.Condition()  # guards what follows
        self._holds: Counter[str] = Counter()
        self._going: set[str] = set()
        self._unnamed: set[str] = set()  # had lost their names when last looked at

    def hold(self, digest: str, still_wanted: Callable[[], bool] = lambda: True) -> bool:
        """Keep a blob until the matching `release`; False, and no hold, unless `still_wanted()` then.

        Asked under the lock: what is named at that moment is not removed before the hold counts.
        """
        with self._changed:
            self._changed.wait_for(lambda: digest not in self._going)
            if not still_wanted():
                return False
            self._holds[digest] += 1
            return True

    def release(self, digest: str) -> bool:
        """End a hold; memory only. True: nobody holds it and it had lost its name, so `free` it."""
        with self._changed:
            assert self._holds[digest] > 0, "a release without a hold"
            self._holds[digest] -= 1
            if self._holds[digest]:
                return False
            del self._holds[digest]
            return digest in self._unnamed

    def free(self, digest: str) -> bool:
        """Remove a blob if nobody holds or names it. False: it stays, at least until its last `release`."""
        with self._changed:
            if digest in self._going:
                return False
            if self._is_named(digest):
                self._unnamed.discard(digest)
                return False
            self._unnamed.add(digest)
            if digest in self._holds:
                return False
            self._going.add(digest)
            self._unnamed.discard(digest)
        try:
            self._remove(digest)
        finally:
            with self._changed:
                self._going.discard(digest)
                self._changed.notify_all()
        return True

    @contextlib.contextmanager
    def naming(self, digest: str) -> Iterator[None]:
        """While an upload publishes a blob and then names it; if it fails, the blob does not stay."""
        self.hold(digest)
        try:
            yield
        except BaseException:
            self.release(digest)
            self.free(digest)
            raise
        self.release(digest)

    def num_holds(self, digest: str) -> int:
        """How many hold this blob now."""
        with self._changed:
            return self._holds.get(digest, 0)
