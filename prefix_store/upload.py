"""One upload: bytes come in, are judged, and become a version, or leave no trace.

Worker threads of the HTTP handler call it, one step after the other; an abort that comes while a commit
still runs (its client went away) waits for it. `store` makes uploads and lends them its parts. The order is
the promise: everything is proved before anything is visible, and the blob is durable before the log names it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType

from prefix_store.artifact import Prefix
from prefix_store.backends.base import StagedBlob
from prefix_store.catalog import Catalog
from prefix_store.errors import ArtifactTooLarge, DigestMismatch, Problem, StoreFailed
from prefix_store.header import LENGTH_BYTES, MAX_HEADER_BYTES, read_header
from prefix_store.importers.incoming import Incoming, recognise
from prefix_store.importers.recognition import ImportOptions
from prefix_store.retention import Retention
from prefix_store.spec import BaseSpec, PrefixVersion, digest_of
from prefix_store.validation import (
    Limits,
    accept,
    max_artifact_bytes,
    require_compatible,
    value_warnings,
    warnings_for,
)


@dataclass(frozen=True, slots=True)
class PutResult:
    """`created`: the bytes were new to the task. `activated`: `live` moved to the version."""

    version: PrefixVersion
    created: bool
    activated: bool
    warnings: tuple[str, ...]


class Upload:
    """A context manager: aborted on leaving, unless committed."""

    def __init__(
        self,
        staged: StagedBlob,
        catalog: Catalog,
        retention: Retention,
        base: BaseSpec,
        limits: Limits,
    ) -> None:
        self._staged = staged
        self._catalog = catalog
        self._retention = retention
        self._base = base
        self._limits = limits
        self._judged: Prefix | None = None  # what the bytes are, once they were found servable
        self.warnings: tuple[str, ...] = ()  # what `judge` found worth telling
        self._lock = threading.RLock()  # a file closed under its reader might be another's by then
        self._max_bytes = max_artifact_bytes(base, limits.max_num_virtual_tokens)

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

    def write(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `ArtifactTooLarge`, `StoreFull`, `StoreFailed`; aborted then."""
        with self._lock:
            try:
                if self._staged.num_bytes + len(chunk) > self._max_bytes:
                    raise ArtifactTooLarge(
                        f"more than {self._max_bytes} bytes, the most that a prefix for this model can have"
                    )
                self._judged = None
                self._staged.write(chunk)
            except BaseException:
                self.abort()
                raise

    def translate(
        self, options: ImportOptions, *, expected_sha256: str | None = None
    ) -> Incoming | None:
        """What to store in place of a file that is not an artifact as it is; None: commit it.

        Raises `DigestMismatch`, `MalformedArtifact`, `IncompatiblePrefix`, `ImportRefused`, `RebaseRefused`.
        """
        with self._lock:
            self._check_digest(expected_sha256)
            head = self._staged.read(LENGTH_BYTES + MAX_HEADER_BYTES)
            found = recognise(head, self._staged.num_bytes, self._base, self._limits, options)
            if found is None:
                return None
            content = found.read(self._read_back(), self._staged.digest)
            return Incoming(found.recognition, content)

    def judge(self, *, expected_sha256: str | None = None) -> Prefix:
        """The prefix that the bytes are, proved servable by all that can be read off them.

        Header first: memory for the whole artifact is taken only for one that could be right. Raises
        `DigestMismatch`, `MalformedArtifact`, `IncompatiblePrefix`, `StoreFailed`.
        """
        with self._lock:
            self._check_digest(expected_sha256)
            head = self._staged.read(LENGTH_BYTES + MAX_HEADER_BYTES)
            require_compatible(read_header(head, self._staged.num_bytes), self._base, self._limits)
            prefix = accept(self._read_back(), self._staged.digest, self._base, self._limits)
            self._judged = prefix
            self.warnings = (*warnings_for(prefix.manifest, self._base), *value_warnings(prefix))
            return prefix

    @property
    def digest(self) -> str:
        """Of the bytes so far."""
        return self._staged.digest

    @property
    def num_bytes(self) -> int:
        """How many bytes there are so far."""
        return self._staged.num_bytes

    def commit(
        self,
        task: str,
        *,
        activate: bool = True,
        if_match: str | None = None,
        if_none_match: bool = False,
        expected_sha256: str | None = None,
    ) -> PutResult:
        """Judge the bytes, unless that was done, and make them a version of `task`, with `activate` the live one; durable on return.

        `if_match`, `if_none_match`: as in `Catalog.check_preconditions`. `expected_sha256`: the digest
        that the caller announced, with or without `sha256:` before it. Raises `InvalidTaskName`,
        `PreconditionFailed`, `DigestMismatch`, `MalformedArtifact`, `IncompatiblePrefix`, `StoreFull`,
        `StoreFailed` or `PrefixUnavailable`; then nothing changed. Ends the upload either way.
        """
        with self._lock, self:  # leaving aborts, which after publishing only tidies up
            # Asked now to spare the work, and again when the record is written.
            self._catalog.check_preconditions(task, if_match=if_match, if_none_match=if_none_match)
            prefix = self._judged or self.judge(expected_sha256=expected_sha256)
            digest, size_bytes = self._staged.digest, self._staged.num_bytes
            with self._retention.naming(digest):
                self._staged.publish()
                published = self._catalog.publish(
                    task,
                    digest,
                    size_bytes,
                    prefix.manifest,
                    activate=activate,
                    if_match=if_match,
                    if_none_match=if_none_match,
                )
        return PutResult(*published, self.warnings)

    def abort(self) -> None:
        """Drop what was written. Harmless after `commit` and when repeated."""
        with self._lock:
            self._judged = None
            self._staged.discard()

    def _check_digest(self, expected: str | None) -> None:
        got = self._staged.digest
        if expected is not None and expected.lower().removeprefix("sha256:") != got[7:]:
            raise DigestMismatch([Problem("", f"the bytes received have the digest {got}")])

    def _read_back(self) -> bytearray:
        data = self._staged.read()
        if digest_of(data) != self._staged.digest:
            raise StoreFailed(
                "the file system of the prefix store gave back other bytes than it took"
            )
        return data
