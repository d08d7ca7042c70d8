"""Which versions each task has: the append-only logs, held in memory and advanced record by record.

Versions count up for ever, also across a delete, so `task@v3` never means two things; the aliases `live` and
`canary` move between them, each move a record. A log that fails its checks makes that task unavailable, and is
logged. Thread-safe: writers take turns under one lock, which they hold while
the record is made durable; readers take no lock and see one immutable state of the whole catalog. Called by
`store`. Knows nothing of torch or files.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from prefix_store import records
from prefix_store.backends.base import RecordLog
from prefix_store.conditions import check_canary, check_match
from prefix_store.errors import (
    NoSuchMove,
    PreconditionFailed,
    PrefixUnavailable,
    UnknownTask,
    UnknownVersion,
)
from prefix_store.name_index import NameIndex
from prefix_store.records import (
    CanaryRecord,
    DeleteRecord,
    EndCanaryRecord,
    EndGrantRecord,
    GrantRecord,
    PromoteRecord,
    PublishRecord,
    Record,
    RollbackRecord,
    StoreRecord,
)
from prefix_store.spec import (
    Canary,
    PrefixManifest,
    PrefixVersion,
    TaskInfo,
    check_task_name,
    tenant_of,
)
from prefix_store.task_log import BrokenLog, TaskLog, replay, replay_or_broken

_BY_NUMBER: Final = re.compile(r"v([1-9][0-9]{0,8})")
_BY_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{12,64}")


LIVE: Final = "live"
CANARY: Final = "canary"


class Publication(NamedTuple):
    """`created`: the bytes were new to the task. `activated`: `live` moved to the version."""

    version: PrefixVersion
    created: bool
    activated: bool


class Catalog:
    """The version logs over `log`, which nobody else writes to.

    Invariants: the state equals what a replay of the stored records gives, except that a record whose
    append failed is in neither.
    """

    def __init__(self, log: RecordLog) -> None:
        """Replay everything stored."""
        self._log = log
        self._lock = threading.Lock()  # held by writers, for one whole check-append-advance
        self._state: Mapping[str, TaskLog | BrokenLog] = {  # replaced, never changed
            name: replay_or_broken(name, payloads) for name, payloads in log.read_logs().items()
        }
        self._names: tuple[object, NameIndex] = (None, NameIndex(()))  # of which state

    def publish(
        self,
        task: str,
        digest: str,
        size_bytes: int,
        manifest: PrefixManifest,
        *,
        activate: bool = True,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> Publication:
        """Make `digest` a version, and with `activate` the live one; durable on return.

        The same bytes are the same version: if `task` has them already, only `live` may move to it.
        Raises as `check_preconditions` does, and what the log's append raises; then nothing changed.
        """
        with self._lock:
            self.check_preconditions(task, if_match=if_match, if_none_match=if_none_match)
            log = self._task_log(task)
            known = log.with_digest(digest)
            if known is not None and (not activate or log.live == known):
                return Publication(known, created=False, activated=False)
            if known is not None:
                self._append(log, PromoteRecord(**_frame(log, task), version=known.version))
                return Publication(known, created=False, activated=True)
            kind = PublishRecord if activate else StoreRecord
            record = kind(
                **_frame(log, task),
                version=log.num_versions + 1,
                digest=digest,
                size_bytes=size_bytes,
                manifest=manifest,
            )
            version = self._append(log, record).versions[-1]
            return Publication(version, created=True, activated=activate)

    def promote(self, task: str, number: int, *, if_match: str | None = None) -> bool:
        """Make version `number` live; durable on return. False: it was live already, nothing changed.

        Raises `UnknownTask`, `UnknownVersion`, or as `check_preconditions` does.
        """
        with self._lock:
            version = self.get(task, f"v{number}")
            self.check_preconditions(task, if_match=if_match)
            log = self._task_log(task)
            if log.live == version:
                return False
            self._append(log, PromoteRecord(**_frame(log, task), version=number))
            return True

    def rollback(self, task: str, *, if_match: str | None = None) -> PrefixVersion:
        """Make the version live that was so before the present one; durable on return.

        Raises `NoSuchMove` without one, `UnknownTask`, or as `check_preconditions` does.
        """
        with self._lock:
            log = self._existing(task)
            self.check_preconditions(task, if_match=if_match)
            if log.previous is None:
                raise NoSuchMove(f"task {task!r} has no version that was live before")
            self._append(log, RollbackRecord(**_frame(log, task), version=log.previous.version))
            return log.previous

    def set_canary(
        self,
        task: str,
        number: int,
        weight: float,
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> bool:
        """Put version `number` on trial; durable on return. False: it was so already.

        The conditions are about the canary. Raises `NoSuchMove` for the live version, `UnknownTask`,
        `UnknownVersion`, `PreconditionFailed`.
        """
        with self._lock:
            version = self.get(task, f"v{number}")
            log = self._existing(task)
            check_canary(log, task, if_match=if_match, if_none_match=if_none_match)
            if version == log.live:
                raise NoSuchMove(
                    f"version {number} of task {task!r} is live; its canary is another"
                )
            if log.canary == Canary(version, weight):
                return False
            self._append(log, CanaryRecord(**_frame(log, task), version=number, weight=weight))
            return True

    def end_canary(self, task: str, *, if_match: str | None = None) -> None:
        """Send all requests to the live version again; durable on return.

        Raises `UnknownVersion` without a canary, `UnknownTask`, `PreconditionFailed`.
        """
        with self._lock:
            self.get(task, CANARY)
            log = self._existing(task)
            check_canary(log, task, if_match=if_match)
            self._append(log, EndCanaryRecord(**_frame(log, task)))

    def grant(self, task: str, tenant: str) -> bool:
        """Let another `tenant` use the task; durable on return. False: it may already, or owns the task.

        Raises `UnknownTask`.
        """
        with self._lock:
            log = self._existing(task)
            if tenant in log.grants or tenant == tenant_of(task):
                return False
            self._append(log, GrantRecord(**_frame(log, task), tenant=tenant))
            return True

    def end_grant(self, task: str, tenant: str) -> bool:
        """End what `grant` began; durable on return. False: there was no grant. Raises `UnknownTask`."""
        with self._lock:
            log = self._existing(task)
            if tenant not in log.grants:
                return False
            self._append(log, EndGrantRecord(**_frame(log, task), tenant=tenant))
            return True

    def delete(self, task: str, *, if_match: str | None = None) -> tuple[PrefixVersion, ...]:
        """Remove the task with all its versions, which are returned; durable on return.

        Raises `UnknownTask`, or as `check_preconditions` does.
        """
        with self._lock:
            log = self._existing(task)
            self.check_preconditions(task, if_match=if_match)
            self._append(log, DeleteRecord(**_frame(log, task)))
            return log.versions

    def check_preconditions(
        self, task: str, *, if_match: str | None = None, if_none_match: bool = False
    ) -> None:
        """Raise `PreconditionFailed` unless the live version is as the caller expects.

        `if_match`: the digest that must be live, or `*` for any. `if_none_match`: the task must not exist.
        Raises `InvalidTaskName`, and `PrefixUnavailable` for a task whose log is broken.
        """
        log = self._task_log(check_task_name(task))
        if if_none_match and log.versions:
            raise PreconditionFailed(
                f"task {task!r} exists already, at version {log.versions[-1].version}"
            )
        check_match(f"live version of task {task!r}", log.live, if_match)

    def live(self, task: str) -> PrefixVersion:
        """What the bare name means, canaries aside.

        Raises `UnknownTask`, `InvalidTaskName`, `PrefixUnavailable`; `UnknownVersion` if none is live.
        """
        live = self._existing(task).live
        if live is None:
            raise UnknownVersion(f"task {task!r} has no live version; promote one")
        return live

    def get(self, task: str, selector: str) -> PrefixVersion:
        """A version by number (`v3`), alias (`live`, `canary`) or digest (`sha256:` and 12 to 64 hex digits).

        Raises `UnknownVersion`, also if a digest's beginning fits several, and as `live` does.
        """
        log = self._existing(task)
        if selector == LIVE:
            return self.live(task)
        if selector == CANARY:
            found = [log.canary.version] if log.canary else []
        elif match := _BY_NUMBER.fullmatch(selector):
            found = [version for version in log.versions if version.version == int(match[1])]
        elif _BY_DIGEST.fullmatch(selector):
            found = [version for version in log.versions if version.digest.startswith(selector)]
        else:
            raise UnknownVersion(
                f"version {selector[:80]!r}: expected v<number>, live, canary or "
                "sha256:<12 to 64 hex digits>"
            )
        if len({version.digest for version in found}) > 1:
            raise UnknownVersion(f"{selector!r} fits several versions of task {task!r}")
        if not found:
            raise UnknownVersion(f"task {task!r} has no version {selector!r}")
        return found[-1]

    def num_versions_ever(self, task: str) -> int:
        """How many versions the task has had, deleted ones included. Raises as `live` does, but `UnknownTask`."""
        return self._task_log(check_task_name(task)).num_versions

    def is_named(self, version: PrefixVersion) -> bool:
        """Whether a request could still ask for this version."""
        log = self._state.get(records.log_name(version.task))
        return isinstance(log, TaskLog) and version in log.versions

    def task(self, name: str) -> TaskInfo:
        """A task with its versions. Raises as `live` does."""
        return self._existing(name).info(name)

    def tasks(self) -> list[TaskInfo]:
        """All tasks that have a version, by name."""
        logs = [log for log in self._state.values() if isinstance(log, TaskLog) and log.versions]
        infos = [log.info(log.versions[0].task) for log in logs]
        return sorted(infos, key=lambda info: info.name)

    def names(self) -> NameIndex:
        """The names of all tasks that have a live version, and who sees which; made once for each state."""
        state = self._state
        made_of, names = self._names
        if made_of is not state:
            logs = [log for log in state.values() if isinstance(log, TaskLog)]
            names = NameIndex((log.live.task, log.grants) for log in logs if log.live)
            self._names = (state, names)
        return names

    def grants(self, task: str) -> frozenset[str]:
        """To whom a task is granted; nobody, if there is no such task, or its log is damaged. Never raises."""
        log = self._state.get(records.log_name(task))
        return log.grants if isinstance(log, TaskLog) else frozenset()

    def is_taken(self, task: str) -> bool:
        """Whether there is a task of this name, if only a damaged one. Never raises."""
        log = self._state.get(records.log_name(task))
        return isinstance(log, BrokenLog) or bool(log and log.versions)

    def num_broken(self) -> int:
        """How many logs failed their checks. While there are any, no blob may be called unreferenced."""
        return sum(isinstance(log, BrokenLog) for log in self._state.values())

    def referenced_digests(self) -> set[str]:
        """The digests of all versions that can be named."""
        return {version.digest for info in self.tasks() for version in info.versions}

    def check_invariants(self) -> None:
        """For tests: the state in memory is what a replay of the stored records gives."""
        with self._lock:
            for name, payloads in self._log.read_logs().items():
                held = self._state.get(name, TaskLog())
                if isinstance(held, TaskLog):
                    assert held == replay(name, payloads)

    def _existing(self, task: str) -> TaskLog:
        """The log of a task that has versions. Raises `UnknownTask`, and as `_task_log` does."""
        log = self._task_log(check_task_name(task))
        if not log.versions:
            raise UnknownTask(f"there is no task {task!r}")
        return log

    def _task_log(self, task: str) -> TaskLog:
        log = self._state.get(records.log_name(task), TaskLog())
        if isinstance(log, BrokenLog):
            raise PrefixUnavailable(f"the version log of task {task!r} is damaged: {log}")
        return log

    def _append(self, log: TaskLog, record: Record) -> TaskLog:
        """Durable first, visible second. Called with the lock held."""
        payload = records.dump(record)
        name = records.log_name(record.task)
        advanced = log.apply(record, payload)
        self._log.append_record(name, record.index, payload)
        self._state = {**self._state, name: advanced}
        return advanced


def _frame(log: TaskLog, task: str) -> dict[str, Any]:
    """The fields that tie a new record to the end of `log`."""
    return {
        "index": log.num_records + 1,
        "prev": log.last_hash,
        "task": task,
        "created_at": records.now(),
    }
