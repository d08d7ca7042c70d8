"""Which versions each task has: the append-only logs, held in memory and advanced record by record.

Versions count up for ever, also across a delete, so `task@v3` never means two things. A log that fails its
checks makes that task unavailable. Thread-safe: writers take turns under one lock, which they hold while
the record is made durable; readers take no lock and see one immutable state of the whole catalog. Called by
`store`. Knows nothing of torch or files.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from prefix_store import records
from prefix_store.backends.base import RecordLog
from prefix_store.errors import (
    PreconditionFailed,
    PrefixUnavailable,
    UnknownTask,
    UnknownVersion,
)
from prefix_store.records import DeleteRecord, PublishRecord, Record
from prefix_store.spec import PrefixManifest, PrefixVersion, TaskInfo, check_task_name
from prefix_store.task_log import BrokenLog, TaskLog, replay

_BY_NUMBER: Final = re.compile(r"v([1-9][0-9]{0,8})")
_BY_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{12,64}")


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
            name: _replay_or_broken(name, payloads) for name, payloads in log.read_logs().items()
        }

    def publish(
        self,
        task: str,
        digest: str,
        size_bytes: int,
        manifest: PrefixManifest,
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> tuple[PrefixVersion, bool]:
        """Make `digest` the live version; durable on return. False: it was live already, nothing changed.

        Raises as `check_preconditions` does, and what the log's append raises; then nothing changed.
        """
        with self._lock:
            self.check_preconditions(task, if_match=if_match, if_none_match=if_none_match)
            log = self._task_log(task)
            if log.live is not None and log.live.digest == digest:
                return log.live, False
            record = PublishRecord(
                index=log.num_records + 1,
                prev=log.last_hash,
                task=task,
                created_at=_now(),
                version=log.num_versions + 1,
                digest=digest,
                size_bytes=size_bytes,
                manifest=manifest,
            )
            live = self._append(log, record).live
            assert live is not None
            return live, True

    def delete(self, task: str, *, if_match: str | None = None) -> None:
        """Remove the task with all its versions from every listing; durable on return.

        Raises `UnknownTask`, or as `check_preconditions` does.
        """
        with self._lock:
            self.live(task)
            self.check_preconditions(task, if_match=if_match)
            log = self._task_log(task)
            index = log.num_records + 1
            self._append(
                log, DeleteRecord(index=index, prev=log.last_hash, task=task, created_at=_now())
            )

    def check_preconditions(
        self, task: str, *, if_match: str | None = None, if_none_match: bool = False
    ) -> None:
        """Raise `PreconditionFailed` unless the live version is as the caller expects.

        `if_match`: the digest that must be live, or `*` for any. `if_none_match`: none may be live.
        Raises `InvalidTaskName`, and `PrefixUnavailable` for a task whose log is broken.
        """
        live = self._task_log(check_task_name(task)).live
        if if_none_match and live is not None:
            raise PreconditionFailed(f"task {task!r} exists already, at version {live.version}")
        if if_match is None:
            return
        if live is None:
            raise PreconditionFailed(f"task {task!r} has no live version to match")
        if if_match not in ("*", live.digest):
            raise PreconditionFailed(f"the live version of task {task!r} is {live.digest}")

    def live(self, task: str) -> PrefixVersion:
        """What the bare name means. Raises `UnknownTask`, `InvalidTaskName`, `PrefixUnavailable`."""
        live = self._task_log(check_task_name(task)).live
        if live is None:
            raise UnknownTask(f"there is no task {task!r}")
        return live

    def get(self, task: str, selector: str) -> PrefixVersion:
        """A version by number (`v3`) or digest (`sha256:` and 12 to 64 hex digits, if that is unique).

        Raises `UnknownVersion`, and as `live` does. A digest published twice means its later version.
        """
        self.live(task)
        versions = self._task_log(task).versions
        if match := _BY_NUMBER.fullmatch(selector):
            found = [version for version in versions if version.version == int(match[1])]
        elif _BY_DIGEST.fullmatch(selector):
            found = [version for version in versions if version.digest.startswith(selector)]
        else:
            raise UnknownVersion(
                f"version {selector[:80]!r}: expected v<number> or sha256:<12 to 64 hex digits>"
            )
        if len({version.digest for version in found}) > 1:
            raise UnknownVersion(f"{selector!r} fits several versions of task {task!r}")
        if not found:
            raise UnknownVersion(f"task {task!r} has no version {selector!r}")
        return found[-1]

    def num_versions_ever(self, task: str) -> int:
        """How many versions the task has had, deleted ones included. Raises as `live` does, but `UnknownTask`."""
        return self._task_log(check_task_name(task)).num_versions

    def task(self, name: str) -> TaskInfo:
        """A task with its versions. Raises as `live` does."""
        live = self.live(name)
        return TaskInfo(name, live, self._task_log(name).versions)

    def tasks(self) -> list[TaskInfo]:
        """All tasks that have a live version, by name."""
        logs = [log for log in self._state.values() if isinstance(log, TaskLog)]
        infos = [TaskInfo(log.live.task, log.live, log.versions) for log in logs if log.live]
        return sorted(infos, key=lambda info: info.name)

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


def _replay_or_broken(name: str, payloads: Mapping[int, bytes]) -> TaskLog | BrokenLog:
    try:
        return replay(name, payloads)
    except BrokenLog as broken:
        return broken


def _now() -> str:
    """Wall clock, for people only; order is the record's index."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
