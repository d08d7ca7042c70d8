"""`PrefixStore`: the one object through which everything else reaches prefixes.

It wires the parts (backend, catalog, validation, host cache) and adds nothing to them but the order of the
steps. All methods may be called from any thread. Those that say so touch the disk and block; the others only
read memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prefix_store.artifact import Prefix, as_it_is
from prefix_store.backends.base import Backend, BlobReader
from prefix_store.backends.filesystem import FilesystemBackend
from prefix_store.catalog import Catalog
from prefix_store.errors import PrefixRejected, PrefixUnavailable, UnknownTask
from prefix_store.host_cache import HostCache
from prefix_store.retention import Retention
from prefix_store.spec import BaseSpec, PrefixVersion, TaskInfo, digest_of, split_ref
from prefix_store.suggestions import similar_names
from prefix_store.upload import PutResult, Upload
from prefix_store.validation import Limits, accept, max_artifact_bytes


class LoadedPrefix(NamedTuple):
    """`from_host`: it was in host memory already, nothing was read from disk."""

    prefix: Prefix
    from_host: bool


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The fill of both tiers, and the host cache's counters since start."""

    host_bytes: int
    host_capacity_bytes: int
    host_entries: int
    host_hits: int
    host_misses: int
    host_evictions: int
    disk_bytes: int
    disk_entries: int


class PrefixStore:
    """Prefixes of many tasks for one base model: durable, versioned, verified whenever they are read."""

    def __init__(
        self,
        backend: Backend,
        base: BaseSpec,
        limits: Limits,
        *,
        host_cache_bytes: int,
        keep_as: Callable[[Prefix], Prefix] = as_it_is,
    ) -> None:
        """Take over `backend`, and sweep the blobs that no version names any more.

        `keep_as`: the form in which what was read from disk is kept in host memory, for whoever moves it on.
        """
        self._backend = backend
        self._base = base
        self._limits = limits
        self._keep_as = keep_as
        self._catalog = Catalog(backend)
        if not self._catalog.num_broken():  # a broken log may name blobs that only it knows of
            backend.sweep_blobs(self._catalog.referenced_digests())
        self._host: HostCache[Prefix] = HostCache(host_cache_bytes, self._read_verified)
        self._retention = Retention(self._is_named, self._remove)

    @classmethod
    def open(
        cls,
        root: Path,
        base: BaseSpec,
        *,
        host_cache_bytes: int,
        max_num_virtual_tokens: int = 4096,
        keep_as: Callable[[Prefix], Prefix] = as_it_is,
    ) -> PrefixStore:
        """The store in the directory `root`, made if it is missing.

        Raises `StoreLocked` when another process has it open, `StoreFailed` when it can not be used.
        """
        limits = Limits(max_num_virtual_tokens=max_num_virtual_tokens)
        backend = FilesystemBackend(root)
        try:
            return cls(backend, base, limits, host_cache_bytes=host_cache_bytes, keep_as=keep_as)
        except BaseException:
            backend.close()
            raise

    def close(self) -> None:
        """Give the directory up for another process. Harmless when repeated."""
        self._backend.close()

    @property
    def base(self) -> BaseSpec:
        """The resident model, as the store judges prefixes by it."""
        return self._base

    @property
    def limits(self) -> Limits:
        """What the operator allows a prefix to be."""
        return self._limits

    @property
    def max_artifact_bytes(self) -> int:
        """Uploads longer than this are refused before they are read."""
        return max_artifact_bytes(self._base, self._limits.max_num_virtual_tokens)

    @property
    def num_broken_tasks(self) -> int:
        """Tasks that are unavailable because their version logs are damaged."""
        return self._catalog.num_broken()

    def begin_upload(self) -> Upload:
        """A new upload. Raises `StoreFull` or `StoreFailed`."""
        return Upload(
            self._backend.stage(), self._catalog, self._retention, self._base, self._limits
        )

    def check_preconditions(
        self, task: str, *, if_match: str | None = None, if_none_match: bool = False
    ) -> None:
        """Whether an upload's commit would hold now, to spare the work before it. Raises as it does."""
        self._catalog.check_preconditions(task, if_match=if_match, if_none_match=if_none_match)

    def put(
        self,
        task: str,
        data: bytes,
        *,
        activate: bool = True,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> PutResult:
        """Upload an artifact that is in memory, judged but not tried on the model. Raises as `Upload.write` and `Upload.commit` do."""
        with self.begin_upload() as upload:
            upload.write(data)
            return upload.commit(
                task, activate=activate, if_match=if_match, if_none_match=if_none_match
            )

    # ---- aliases; all block --------------------------------------------------------------------

    def promote(self, task: str, number: int, *, if_match: str | None = None) -> bool:
        """Make version `number` live, once it is proved readable. False: it was live already.

        Raises as `resolve`, `load` and `Catalog.promote` do.
        """
        self.load(self._catalog.get(task, f"v{number}").digest)
        return self._catalog.promote(task, number, if_match=if_match)

    def rollback(self, task: str, *, if_match: str | None = None) -> PrefixVersion:
        """Make the version live that was so before, once it is proved readable.

        Raises as `resolve`, `load` and `Catalog.rollback` do.
        """
        previous = self._catalog.task(task).previous
        if previous is not None:
            self.load(previous.digest)
        return self._catalog.rollback(task, if_match=if_match)

    def set_canary(
        self,
        task: str,
        number: int,
        weight: float,
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> bool:
        """Put a version on trial, once it is proved readable. False: it was so already.

        Raises as `resolve`, `load` and `Catalog.set_canary` do.
        """
        self.load(self._catalog.get(task, f"v{number}").digest)
        return self._catalog.set_canary(
            task, number, weight, if_match=if_match, if_none_match=if_none_match
        )

    def end_canary(self, task: str, *, if_match: str | None = None) -> None:
        """End a trial. Raises as `Catalog.end_canary` does."""
        self._catalog.end_canary(task, if_match=if_match)

    # ---- tenants -------------------------------------------------------------------------------

    def grant(self, task: str, tenant: str) -> bool:
        """Let another tenant use a task. Blocks. As `Catalog.grant`."""
        return self._catalog.grant(task, tenant)

    def end_grant(self, task: str, tenant: str) -> bool:
        """End that. Blocks. As `Catalog.end_grant`."""
        return self._catalog.end_grant(task, tenant)

    def is_granted(self, task: str, tenant: str) -> bool:
        """Whether a tenant may use a task of another; False for a task that there is not."""
        return tenant in self._catalog.grants(task)

    def is_taken(self, task: str) -> bool:
        """Whether there is a task of this name, if only a damaged one."""
        return self._catalog.is_taken(task)

    # ---- removal -------------------------------------------------------------------------------

    def delete(self, task: str, *, if_match: str | None = None) -> list[str]:
        """Remove a task; returns the digests that nobody can ask for any more, for `free`. Blocks.

        Raises `UnknownTask`, `InvalidTaskName`, `PreconditionFailed`, `StoreFull`, `StoreFailed`.
        """
        versions = self._catalog.delete(task, if_match=if_match)
        return sorted({v.digest for v in versions} - self._catalog.referenced_digests())

    def hold(self, version: PrefixVersion) -> None:
        """Keep the bytes of a version for a request until `release`, whatever happens to the task.

        Raises `UnknownTask` when it was deleted since it was resolved.
        """
        named = functools.partial(self._catalog.is_named, version)
        if not self._retention.hold(version.digest, named):
            raise UnknownTask(f"task {version.task!r} was deleted")

    def release(self, digest: str) -> bool:
        """End a `hold`. True: it was the last one of bytes that no version names, so `free` them."""
        return self._retention.release(digest)

    def num_holds(self, digest: str) -> int:
        """How many requests and uploads hold these bytes."""
        return self._retention.num_holds(digest)

    def free(self, digest: str) -> bool:
        """Remove bytes from disk and host memory if nobody names or holds them; True if they went. Blocks.

        While a version log is damaged nothing goes: it may name what no other does.
        """
        return self._retention.free(digest)

    def drop_from_host(self, digest: str) -> bool:
        """Forget a prefix in host memory, not on disk. True: it was there."""
        return self._host.discard(digest)

    # ---- reading -------------------------------------------------------------------------------

    def resolve(self, ref: str) -> PrefixVersion:
        """What `task`, `task@v3`, `task@canary` or `task@sha256:<12 to 64 hex digits>` names now.

        A canary's share of the bare name is the caller's affair (`canary.takes_canary`). Raises `InvalidTaskName`, `UnknownTask`, `UnknownVersion` or `PrefixUnavailable`.
        """
        task, selector = split_ref(ref)
        return self._catalog.live(task) if selector is None else self._catalog.get(task, selector)

    def tasks(self) -> list[TaskInfo]:
        """All tasks, by name."""
        return self._catalog.tasks()

    def task(self, name: str) -> TaskInfo:
        """One task. Raises `InvalidTaskName`, `UnknownTask` or `PrefixUnavailable`."""
        return self._catalog.task(name)

    def num_versions_ever(self, name: str) -> int:
        """How many versions a task has had, deleted ones included; 0 for a name that was never used."""
        return self._catalog.num_versions_ever(name)

    def similar(self, name: str, limit: int = 5, *, seen_by: str | None = None) -> list[str]:
        """Names that `name` may have been meant to be, the closest first; only those that a tenant sees, if one is given."""
        names = self._catalog.names()
        known = names.everything if seen_by is None else names.seen_by(seen_by)
        return similar_names(name, known, limit)

    def load(self, digest: str) -> LoadedPrefix:
        """A prefix in the serving dtype, from host memory or else from disk. Blocks.

        Takes the digest of any version, also of a deleted one while it is held.
        Raises `PrefixUnavailable` when the bytes are gone, changed, or not for the resident model.
        """
        return LoadedPrefix(*self._host.get(digest))

    def open_content(self, version: PrefixVersion) -> BlobReader:
        """The stored bytes, to be read in pieces; not verified. Blocks. Raises `PrefixUnavailable`."""
        return self._backend.open_blob(version.digest)

    def host_sizes(self) -> dict[str, int]:
        """Bytes in host memory by digest, least recently used first."""
        return self._host.sizes()

    def is_on_host(self, digest: str) -> bool:
        """Whether `load` would return at once."""
        return digest in self._host

    def stats(self) -> StoreStats:
        """Present sizes and counters."""
        host, disk = self._host.stats(), self._backend.usage()
        return StoreStats(
            host_bytes=host.num_bytes,
            host_capacity_bytes=host.capacity_bytes,
            host_entries=host.num_entries,
            host_hits=host.hits,
            host_misses=host.misses,
            host_evictions=host.evictions,
            disk_bytes=disk.num_bytes,
            disk_entries=disk.num_blobs,
        )

    def _is_named(self, digest: str) -> bool:
        """Or may be: a damaged log names blobs that only it knows of."""
        return bool(self._catalog.num_broken()) or digest in self._catalog.referenced_digests()

    def _remove(self, digest: str) -> None:
        self._backend.remove_blob(digest)
        self._host.discard(digest)

    def _read_verified(self, digest: str) -> Prefix:
        """From disk, trusting nothing: the bytes against their digest, and the prefix against the base."""
        data = self._backend.read_blob(digest)
        if digest_of(data) != digest:
            raise PrefixUnavailable("the stored artifact is damaged; upload it again")
        try:
            prefix = accept(data, digest, self._base, self._limits)
        except PrefixRejected as rejected:
            raise PrefixUnavailable(
                f"the stored artifact does not fit the resident model: {rejected.problems[0].detail}"
            ) from rejected
        return self._keep_as(prefix.to(self._base.layout.dtype))
