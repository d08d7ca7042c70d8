"""`PrefixStore`: the one object through which everything else reaches prefixes.

It wires the parts (backend, catalog, validation, host cache) and adds nothing to them but the order of the
steps. All methods may be called from any thread. `resolve`, `task`, `tasks`, `similar`, `is_on_host` and
`stats` only read memory; `load`, `put`, `delete`, `promote` and uploads touch the disk and block.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prefix_store.artifact import Prefix
from prefix_store.backends.base import Backend
from prefix_store.backends.filesystem import FilesystemBackend
from prefix_store.catalog import Catalog
from prefix_store.errors import PrefixRejected, PrefixUnavailable
from prefix_store.host_cache import HostCache
from prefix_store.spec import BaseSpec, PrefixVersion, TaskInfo, digest_of, split_ref
from prefix_store.upload import PutResult, Upload
from prefix_store.validation import Limits, accept, max_artifact_bytes, warnings_for


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
        self, backend: Backend, base: BaseSpec, limits: Limits, *, host_cache_bytes: int
    ) -> None:
        """Take over `backend`, and sweep the blobs that no version names any more."""
        self._backend = backend
        self._base = base
        self._limits = limits
        self._catalog = Catalog(backend)
        if not self._catalog.num_broken():  # a broken log may name blobs that only it knows of
            backend.sweep_blobs(self._catalog.referenced_digests())
        self._host: HostCache[Prefix] = HostCache(host_cache_bytes, self._read_verified)

    @classmethod
    def open(
        cls,
        root: Path,
        base: BaseSpec,
        *,
        host_cache_bytes: int,
        max_num_virtual_tokens: int = 4096,
    ) -> PrefixStore:
        """The store in the directory `root`, made if it is missing.

        Raises `StoreLocked` when another process has it open, `StoreFailed` when it can not be used.
        """
        limits = Limits(max_num_virtual_tokens=max_num_virtual_tokens)
        backend = FilesystemBackend(root)
        try:
            return cls(backend, base, limits, host_cache_bytes=host_cache_bytes)
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

    def begin_upload(self) -> Upload:
        """A new upload. Raises `StoreFull` or `StoreFailed`."""
        return Upload(self._backend.stage(), self._catalog, self._base, self._limits)

    def put(
        self,
        task: str,
        data: bytes,
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> PutResult:
        """Upload an artifact that is in memory. Raises as `Upload.write` and `Upload.commit` do."""
        with self.begin_upload() as upload:
            upload.write(data)
            return upload.commit(task, if_match=if_match, if_none_match=if_none_match)

    def promote(self, ref: str, *, if_match: str | None = None) -> PutResult:
        """Publish the bytes of an older version anew as the latest one: a rollback that moves forward.

        Proves that they can still be read and served. Raises as `resolve`, `load` and `Upload.commit` do.
        """
        old = self.resolve(ref)
        self.load(old.digest)
        version, created = self._catalog.publish(
            old.task, old.digest, old.size_bytes, old.manifest, if_match=if_match
        )
        return PutResult(version, created, warnings_for(old.manifest, self._base))

    def delete(self, task: str, *, if_match: str | None = None) -> None:
        """Remove a task; requests that run with it may still load its bytes until the store is closed.

        Raises `UnknownTask`, `InvalidTaskName`, `PreconditionFailed`, `StoreFull`, `StoreFailed`.
        """
        self._catalog.delete(task, if_match=if_match)

    def resolve(self, ref: str) -> PrefixVersion:
        """What `task`, `task@v3` or `task@sha256:<12 to 64 hex digits>` names now.

        Raises `InvalidTaskName`, `UnknownTask`, `UnknownVersion` or `PrefixUnavailable`.
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

    def similar(self, name: str, limit: int = 5) -> list[str]:
        """Names of tasks that `name` may have been meant to be, the closest first."""
        names = [info.name for info in self.tasks()]
        return difflib.get_close_matches(name[:64], names, n=limit)

    def load(self, digest: str) -> LoadedPrefix:
        """A prefix in the serving dtype, from host memory or else from disk. Blocks.

        Takes the digest of any version, also one that was replaced or deleted since the store was opened.
        Raises `PrefixUnavailable` when the bytes are gone, changed, or not for the resident model.
        """
        return LoadedPrefix(*self._host.get(digest))

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
        return prefix.to(self._base.layout.dtype)
