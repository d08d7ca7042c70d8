"""What the store needs of a place to keep things: blobs by digest, and append-only logs.

A backend promises durability and create-if-absent, and knows nothing else: not what a blob means, not what
a record says. Errors: `StoreFull`, `StoreFailed`, `PrefixUnavailable`. Every method may be called from any
thread; a `StagedBlob` from one thread at a time. One contract test suite runs over all backends.

A blob is staged, then published:

    staged = backend.stage()
    staged.write(chunk) ...      # invisible; hashed on the way
    staged.read()                # what was written, to be judged before anyone can see it
    staged.publish()             # durable under its digest when this returns
    staged.discard()             # always, at the end; frees what is left of the staging
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """What all published blobs take."""

    num_bytes: int
    num_blobs: int


class StagedBlob(Protocol):
    """Bytes on their way in, seen by nobody else. See the module docstring for the order of calls."""

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        ...

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the bytes written so far."""
        ...

    def write(self, chunk: bytes) -> None:
        """Append. Raises `StoreFull` or `StoreFailed`; then only `discard` may follow."""
        ...

    def read(self, max_bytes: int | None = None) -> bytearray:
        """The first `max_bytes` written (or all), read back from where they are kept."""
        ...

    def publish(self) -> None:
        """Make the blob durable and readable under `digest`.

        A blob that is there already and intact is kept; a damaged one is replaced by these bytes.
        """
        ...

    def discard(self) -> None:
        """Remove the staging. Harmless after `publish` and when repeated; never raises."""
        ...


class BlobReader(Protocol):
    """A published blob, open. Used by one thread at a time, and closed by whoever opened it."""

    @property
    def num_bytes(self) -> int:
        """Its length."""
        ...

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes from `start`; fewer than asked at the end. Raises `PrefixUnavailable`."""
        ...

    def close(self) -> None:
        """Let go of it. Harmless when repeated."""
        ...


class RecordLog(Protocol):
    """Named logs of numbered records: what the catalog stands on."""

    def append_record(self, log: str, index: int, payload: bytes) -> None:
        """Make record `index` of `log` durable. When this raises, the record does not exist.

        `log` is 32 lowercase hex digits. Raises `StoreFailed` if that record exists.
        """
        ...

    def read_logs(self) -> Mapping[str, Mapping[int, bytes]]:
        """Every log with its records by index. A record that can not be read is an empty payload."""
        ...


class Backend(RecordLog, Protocol):
    """A place for blobs and logs. One `PrefixStore` owns it at a time."""

    def stage(self) -> StagedBlob:
        """A new empty staging."""
        ...

    def read_blob(self, digest: str) -> bytearray:
        """A published blob, in memory that the caller then owns; not verified.

        Raises `PrefixUnavailable` when it is not there or can not be read.
        """
        ...

    def open_blob(self, digest: str) -> BlobReader:
        """A published blob to be read in pieces; not verified. Raises `PrefixUnavailable`.

        What is open can be read to its end, also after `remove_blob`.
        """
        ...

    def remove_blob(self, digest: str) -> None:
        """Remove a blob as far as that is possible; one that is not there is fine.

        Need not last: a blob that comes back with a power loss is swept at the next opening.
        """
        ...

    def sweep_blobs(self, keep: Set[str]) -> None:
        """Remove the blobs that are not in `keep`. Called at opening only, when no reader exists."""
        ...

    def usage(self) -> DiskUsage:
        """What published blobs take now; cheap."""
        ...

    def close(self) -> None:
        """Give the place up for another owner. Harmless when repeated."""
        ...
