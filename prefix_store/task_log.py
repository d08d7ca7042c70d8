"""One task's history as a value: what its version log says, record by record.

Pure and immutable: applying a record gives a new `TaskLog`. Any thread; called by `catalog`, both to replay
what is stored and to advance after an append, so the two can not disagree.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from prefix_store import records
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
from prefix_store.spec import Canary, PrefixVersion, TaskInfo

logger = logging.getLogger(__name__)


class BrokenLog(Exception):
    """A log that can not be trusted. The task it belongs to is unavailable, never an older version."""


@dataclass(frozen=True, slots=True)
class TaskLog:
    """`versions`: those that can be named, oldest first; empty after a delete.

    `lives`: the versions that were live, the present one last. A promotion adds one, a rollback takes one
    away, so two rollbacks go back two promotions. `num_versions` counts all versions that ever were, so that
    a number is never given twice. `grants`: the tenants that may use the task beside its own.
    Invariants: the canary is another version than the live one; without versions there are no grants.
    """

    num_records: int = 0
    last_hash: str = records.GENESIS
    num_versions: int = 0
    versions: tuple[PrefixVersion, ...] = ()
    lives: tuple[PrefixVersion, ...] = ()
    canary: Canary | None = None
    grants: frozenset[str] = frozenset()

    @property
    def live(self) -> PrefixVersion | None:
        """The version that the bare task name means; None without one."""
        return self.lives[-1] if self.lives else None

    @property
    def previous(self) -> PrefixVersion | None:
        """The version that a rollback would make live."""
        return self.lives[-2] if len(self.lives) > 1 else None

    def info(self, name: str) -> TaskInfo:
        """The task as its users see it."""
        grants = tuple(sorted(self.grants))
        return TaskInfo(name, self.live, self.versions, self.canary, self.previous, grants)

    def find(self, number: int) -> PrefixVersion | None:
        """The version with this number, if it can be named."""
        return next((v for v in self.versions if v.version == number), None)

    def with_digest(self, digest: str) -> PrefixVersion | None:
        """The version of these bytes. A log from before aliases may have several: the live one, or the latest."""
        if self.live is not None and self.live.digest == digest:
            return self.live
        return next((v for v in reversed(self.versions) if v.digest == digest), None)

    def apply(self, record: Record, payload: bytes) -> TaskLog:
        """The log after `record`, whose bytes are `payload`. Raises `BrokenLog` if it does not follow."""
        if record.index != self.num_records + 1 or record.prev != self.last_hash:
            raise BrokenLog(f"record {self.num_records + 1} does not continue the chain")
        log = replace(self, num_records=record.index, last_hash=records.chain_hash(payload))
        match record:
            case PublishRecord():
                return log._stored(record)._promoted(record.version, record.index)
            case StoreRecord():
                return log._stored(record)
            case PromoteRecord(version=number):
                return log._promoted(number, record.index)
            case RollbackRecord(version=number):
                return log._rolled_back(number, record.index)
            case CanaryRecord(version=number, weight=weight):
                return log._with_canary(number, weight, record.index)
            case EndCanaryRecord():
                return replace(log, canary=None)
            case GrantRecord(tenant=tenant):
                return log._granted(log.grants | {tenant}, record.index)
            case EndGrantRecord(tenant=tenant):
                return log._granted(log.grants - {tenant}, record.index)
            case DeleteRecord():
                return replace(log, versions=(), lives=(), canary=None, grants=frozenset())

    def _stored(self, record: PublishRecord | StoreRecord) -> TaskLog:
        if record.version != self.num_versions + 1:
            raise BrokenLog(f"record {record.index} holds version {record.version} out of turn")
        versions = (*self.versions, _version(record))
        return replace(self, num_versions=record.version, versions=versions)

    def _promoted(self, number: int, index: int) -> TaskLog:
        version = self._named(number, index)
        return self._with_lives((*self.lives, version))

    def _rolled_back(self, number: int, index: int) -> TaskLog:
        if self.previous is None or self.previous.version != number:
            raise BrokenLog(
                f"record {index} rolls back to version {number}, which was not live before"
            )
        return self._with_lives(self.lives[:-1])

    def _with_lives(self, lives: tuple[PrefixVersion, ...]) -> TaskLog:
        """A canary that becomes live has passed: it is the canary no more."""
        passed = self.canary is not None and self.canary.version == lives[-1]
        return replace(self, lives=lives, canary=None if passed else self.canary)

    def _with_canary(self, number: int, weight: float, index: int) -> TaskLog:
        version = self._named(number, index)
        if version == self.live:
            raise BrokenLog(f"record {index} makes the live version the canary")
        return replace(self, canary=Canary(version, weight))

    def _granted(self, grants: frozenset[str], index: int) -> TaskLog:
        if not self.versions or grants == self.grants:
            raise BrokenLog(f"record {index} grants or ends what it can not")
        return replace(self, grants=grants)

    def _named(self, number: int, index: int) -> PrefixVersion:
        version = self.find(number)
        if version is None:
            raise BrokenLog(f"record {index} names version {number}, which is not there")
        return version


def replay(name: str, payloads: Mapping[int, bytes]) -> TaskLog:
    """The log called `name` from its stored records. Raises `BrokenLog`."""
    if payloads.keys() != set(range(1, len(payloads) + 1)):
        raise BrokenLog("records are missing")
    log = TaskLog()
    for index in range(1, len(payloads) + 1):
        try:
            record = records.load(payloads[index])
        except ValueError:
            raise BrokenLog(f"record {index} is damaged") from None
        if records.log_name(record.task) != name:
            raise BrokenLog(f"record {index} belongs to another task")
        log = log.apply(record, payloads[index])
    return log


def replay_or_broken(name: str, payloads: Mapping[int, bytes]) -> TaskLog | BrokenLog:
    """As `replay`; a log that can not be trusted is returned, and logged."""
    try:
        return replay(name, payloads)
    except BrokenLog as broken:
        logger.warning(
            "version log %s is damaged, its task is unavailable until it is restored: %s",
            name,
            broken,
        )
        return broken


def _version(record: PublishRecord | StoreRecord) -> PrefixVersion:
    return PrefixVersion(
        task=record.task,
        version=record.version,
        digest=record.digest,
        size_bytes=record.size_bytes,
        created_at=record.created_at,
        manifest=record.manifest,
    )
