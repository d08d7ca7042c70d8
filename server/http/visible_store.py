"""The prefix store as one caller sees it: what handlers have in place of the store itself.

A task is named by its full name, `tenant~task`, or within a tenant by `task` alone; the operator's own have no tenant
in their names. Every name that a client sends goes through `full_name`, which refuses what the caller may not see with
the words, and on the line, that it has for what does not exist. What this class does not offer, handlers can not reach. Any
thread, as the store; made by `server.http.gate` for each request.
"""

from __future__ import annotations

from typing import Final

from prefix_store.backends.base import BlobReader
from prefix_store.errors import UnknownTask
from prefix_store.spec import (
    OPERATOR,
    BaseSpec,
    PrefixVersion,
    TaskInfo,
    check_task_name,
    full_name,
    split_ref,
    tenant_of,
)
from prefix_store.store import PrefixStore, StoreStats
from prefix_store.validation import Limits


class VisibleStore:
    """`tenant` None sees everything. `granted`: also what other tenants let this one use, to read and not to change."""

    def __init__(
        self, store: PrefixStore, tenant: str | None = None, *, granted: bool = False
    ) -> None:
        self._store: Final = store
        self._tenant: Final = tenant
        self._granted: Final = granted

    def seen_by(self, tenant: str | None, *, granted: bool) -> VisibleStore:
        """The same store for another caller."""
        return VisibleStore(self._store, tenant, granted=granted)

    @property
    def sees_all(self) -> bool:
        """Whether nothing is hidden."""
        return self._tenant is None

    # ---- names ---------------------------------------------------------------------------------

    def full_name(self, name: str) -> str:
        """What the caller calls `name`, as everyone calls it. Raises `InvalidTaskName`.

        `UnknownTask` for a task that the caller may not see, whether it exists or not.
        """
        check_task_name(name)
        if self._tenant is None:
            return name
        full = full_name(self._tenant, name)
        if tenant_of(full) == self._tenant:
            # A tenant's own task comes before one that the operator has granted to it.
            return name if full != name and self._is_granted_instead(name, full) else full
        if self._granted and self._store.is_granted(full, self._tenant):
            return full
        raise UnknownTask(f"there is no task {full!r}")

    def _is_granted_instead(self, name: str, full: str) -> bool:
        assert self._tenant is not None
        granted = self._granted and self._store.is_granted(name, self._tenant)
        return granted and not self._store.is_taken(full)

    def shown_name(self, full: str) -> str:
        """How the caller writes a task's name: a tenant's own without the tenant."""
        own = self._tenant not in (None, OPERATOR) and tenant_of(full) == self._tenant
        return full.partition("~")[2] if own else full

    def sees(self, info: TaskInfo) -> bool:
        """Whether the caller may know of a task."""
        if self._tenant is None or tenant_of(info.name) == self._tenant:
            return True
        return self._granted and self._tenant in info.grants

    def evictable(self, digests: list[str]) -> list[str]:
        """Those of a task's bytes that no task has which the caller does not see: it would evict them too."""
        if self._tenant is None:
            return digests
        hidden = (info for info in self._store.tasks() if not self.sees(info))
        shared = {version.digest for info in hidden for version in info.versions}
        return [digest for digest in digests if digest not in shared]

    def similar(self, name: str) -> list[str]:
        """Up to five names that the caller sees and may have meant."""
        if self._tenant is None:
            return self._store.similar(name)
        own = name.removeprefix(f"{self._tenant}~")
        return self._store.similar(own, seen_by=self._tenant)

    # ---- reading -------------------------------------------------------------------------------

    @property
    def base(self) -> BaseSpec:
        """As `PrefixStore.base`."""
        return self._store.base

    @property
    def limits(self) -> Limits:
        """As `PrefixStore.limits`."""
        return self._store.limits

    @property
    def max_artifact_bytes(self) -> int:
        """As `PrefixStore.max_artifact_bytes`."""
        return self._store.max_artifact_bytes

    def resolve(self, ref: str) -> PrefixVersion:
        """As `PrefixStore.resolve`, of what the caller sees."""
        task, selector = split_ref(ref)
        full = self.full_name(task)
        return self._store.resolve(full if selector is None else f"{full}@{selector}")

    def task(self, name: str) -> TaskInfo:
        """As `PrefixStore.task`, of what the caller sees."""
        return self._store.task(self.full_name(name))

    def tasks(self) -> list[TaskInfo]:
        """The tasks that the caller sees, by full name."""
        return [info for info in self._store.tasks() if self.sees(info)]

    def host_sizes(self) -> dict[str, int]:
        """As `PrefixStore.host_sizes`; of all tenants, by digest alone."""
        return self._store.host_sizes()

    def stats(self) -> StoreStats:
        """As `PrefixStore.stats`: sums over all tenants."""
        return self._store.stats()

    # ---- by what was resolved: nothing that the caller may not see can have been ----------------

    def hold(self, version: PrefixVersion) -> None:
        """As `PrefixStore.hold`."""
        self._store.hold(version)

    def release(self, digest: str) -> bool:
        """As `PrefixStore.release`."""
        return self._store.release(digest)

    def num_holds(self, digest: str) -> int:
        """As `PrefixStore.num_holds`."""
        return self._store.num_holds(digest)

    def free(self, digest: str) -> bool:
        """As `PrefixStore.free`."""
        return self._store.free(digest)

    def drop_from_host(self, digest: str) -> bool:
        """As `PrefixStore.drop_from_host`."""
        return self._store.drop_from_host(digest)

    def open_content(self, version: PrefixVersion) -> BlobReader:
        """As `PrefixStore.open_content`."""
        return self._store.open_content(version)

    # ---- changes; only of what a caller owns, for there a view shows nothing granted -------------

    def check_preconditions(
        self, task: str, *, if_match: str | None = None, if_none_match: bool = False
    ) -> None:
        """As `PrefixStore.check_preconditions`."""
        full = self._own(task)
        self._store.check_preconditions(full, if_match=if_match, if_none_match=if_none_match)

    def promote(self, task: str, number: int, *, if_match: str | None = None) -> bool:
        """As `PrefixStore.promote`."""
        return self._store.promote(self._own(task), number, if_match=if_match)

    def rollback(self, task: str, *, if_match: str | None = None) -> PrefixVersion:
        """As `PrefixStore.rollback`."""
        return self._store.rollback(self._own(task), if_match=if_match)

    def set_canary(
        self,
        task: str,
        number: int,
        weight: float,
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> bool:
        """As `PrefixStore.set_canary`."""
        full = self._own(task)
        return self._store.set_canary(
            full, number, weight, if_match=if_match, if_none_match=if_none_match
        )

    def end_canary(self, task: str, *, if_match: str | None = None) -> None:
        """As `PrefixStore.end_canary`."""
        self._store.end_canary(self._own(task), if_match=if_match)

    def delete(self, task: str, *, if_match: str | None = None) -> list[str]:
        """As `PrefixStore.delete`."""
        return self._store.delete(self._own(task), if_match=if_match)

    def grant(self, task: str, tenant: str) -> bool:
        """As `PrefixStore.grant`."""
        return self._store.grant(self._own(task), tenant)

    def end_grant(self, task: str, tenant: str) -> bool:
        """As `PrefixStore.end_grant`."""
        return self._store.end_grant(self._own(task), tenant)

    def _own(self, task: str) -> str:
        assert not self._granted, "a view for inference changes nothing"
        return self.full_name(task)
