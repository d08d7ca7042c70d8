"""One task's history as a value: what its version log says, record by record.

Pure and immutable: applying a record gives a new `TaskLog`. Any thread; called by `catalog`, both to replay
what is stored and to advance after an append, so the two can not disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prefix_store import records
from prefix_store.records import DeleteRecord, PublishRecord, Record
from prefix_store.spec import PrefixVersion


class BrokenLog(Exception):
    """A log that can not be trusted. The task it belongs to is unavailable, never an older version."""


@dataclass(frozen=True, slots=True)
class TaskLog:
    """`versions`: those that can be named, oldest first, the last one live; empty after a delete.

    `num_versions` counts all that ever were, so that a number is never given twice.
    """

    num_records: int = 0
    last_hash: str = records.GENESIS
    num_versions: int = 0
    versions: tuple[PrefixVersion, ...] = ()

    @property
    def live(self) -> PrefixVersion | None:
        """The version that the bare task name means; None without one."""
        return self.versions[-1] if self.versions else None

    def apply(self, record: Record, payload: bytes) -> TaskLog:
        """The log after `record`, whose bytes are `payload`. Raises `BrokenLog` if it does not follow."""
        if record.index != self.num_records + 1 or record.prev != self.last_hash:
            raise BrokenLog(f"record {self.num_records + 1} does not continue the chain")
        advanced = replace(self, num_records=record.index, last_hash=records.chain_hash(payload))
        if isinstance(record, DeleteRecord):
            return replace(advanced, versions=())
        if record.version != self.num_versions + 1:
            raise BrokenLog(f"record {record.index} publishes version {record.version} out of turn")
        return replace(
            advanced, num_versions=record.version, versions=(*self.versions, _version(record))
        )


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


def _version(record: PublishRecord) -> PrefixVersion:
    return PrefixVersion(
        task=record.task,
        version=record.version,
        digest=record.digest,
        size_bytes=record.size_bytes,
        created_at=record.created_at,
        manifest=record.manifest,
    )
