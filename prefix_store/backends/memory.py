"""A backend in memory, for tests and for servers that need nothing to outlive them.

Keeps the whole contract except durability. A store can be closed and opened again on the same object,
which then plays the part of the disk. Any thread.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Set

from prefix_store.backends.base import DiskUsage
from prefix_store.errors import PrefixUnavailable, StoreFailed


class MemoryBackend:
    """Dictionaries behind one lock; `blobs` and `logs` are open to tests that damage them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.blobs: dict[str, bytes] = {}
        self.logs: dict[str, dict[int, bytes]] = {}

    def stage(self) -> MemoryStagedBlob:
        """A new empty staging."""
        return MemoryStagedBlob(self)

    def read_blob(self, digest: str) -> bytearray:
        """A copy of a blob. Raises `PrefixUnavailable`."""
        with self._lock:
            if digest not in self.blobs:
                raise PrefixUnavailable("the artifact is not in the store")
            return bytearray(self.blobs[digest])

    def open_blob(self, digest: str) -> MemoryBlobReader:
        """The blob as it is now. Raises `PrefixUnavailable`."""
        return MemoryBlobReader(bytes(self.read_blob(digest)))

    def remove_blob(self, digest: str) -> None:
        """Forget a blob."""
        with self._lock:
            self.blobs.pop(digest, None)

    def keep_blob(self, digest: str, data: bytes) -> None:
        """Publish, for `MemoryStagedBlob`."""
        with self._lock:
            self.blobs[digest] = data

    def sweep_blobs(self, keep: Set[str]) -> None:
        """Remove the blobs that are not in `keep`."""
        with self._lock:
            for digest in self.blobs.keys() - keep:
                del self.blobs[digest]

    def usage(self) -> DiskUsage:
        """What the blobs take now."""
        with self._lock:
            return DiskUsage(sum(map(len, self.blobs.values())), len(self.blobs))

    def append_record(self, log: str, index: int, payload: bytes) -> None:
        """Keep a new record. Raises `StoreFailed` if that record exists."""
        with self._lock:
            records = self.logs.setdefault(log, {})
            if index in records:
                raise StoreFailed("the version log holds a record that this process did not write")
            records[index] = payload

    def read_logs(self) -> Mapping[str, Mapping[int, bytes]]:
        """A copy of all logs."""
        with self._lock:
            return {log: dict(records) for log, records in self.logs.items()}

    def close(self) -> None:
        """Nothing to give up."""


class MemoryBlobReader:
    """A blob that is in memory anyway."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return len(self._data)

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes from `start`."""
        return self._data[start : start + num_bytes]

    def close(self) -> None:
        """Nothing to let go of."""


class MemoryStagedBlob:
    """A staging in memory."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._data = bytearray()
        self._sha = hashlib.sha256()

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return len(self._data)

    @property
    def digest(self) -> str:
        """Digest of the bytes written so far."""
        return f"sha256:{self._sha.hexdigest()}"

    def write(self, chunk: bytes) -> None:
        """Append."""
        self._data += chunk
        self._sha.update(chunk)

    def read(self, max_bytes: int | None = None) -> bytearray:
        """A copy of the first `max_bytes` (or all)."""
        return self._data[:max_bytes]

    def publish(self) -> None:
        """Make the blob readable under its digest."""
        self._backend.keep_blob(self.digest, bytes(self._data))

    def discard(self) -> None:
        """Free the memory."""
        self._data = bytearray()
