"""Bugs for the crash points to find: each sync left out, and steps in the wrong order. Called by `test_crash_points`.

A sync has the name of the function that asks for it, so that one which is added to the store later has to be found here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from prefix_store import store
from prefix_store.audit_log import AuditLog
from prefix_store.backends import durable_files, filesystem
from tests.prefix_store.simulated_files import SimulatedOs

SYNCS: Final = {
    "FileStagedBlob.publish: fsync": "first_upload",
    "FilesystemBackend._recover: sync": "opening_a_new_store",
    "FilesystemBackend._write_synced: fsync": "promotion_and_rollback",
    "link_new: sync_dir": "promotion_and_rollback",
    "make_dir: sync_dir": "first_upload",
    "AuditLog._ready_for: sync_dir": "audit_records_over_several_files",
    "AuditLog._recover: fsync": "audit_records_over_several_files",
    "AuditLog._recover: sync_dir": "audit_records_over_several_files",
    "AuditLog.append: fsync": "audit_records_over_several_files",
    "KeyStore._recover: sync": "the_first_key",
    "KeyStore._recover: sync_dir": "keys_of_several_processes",
    "KeyStore._append: fsync": "the_first_key",
}
"""Each with a scenario that shows it."""


def asked_by() -> str:
    """Which sync of the store this is; called by the stand-ins for `fsync` and `sync`."""
    call = sys._getframe(1)
    caller = call.f_back
    assert caller is not None
    name = call.f_code.co_name
    if caller.f_code.co_name == "sync_dir":
        name, caller = "sync_dir", caller.f_back
    assert caller is not None
    return f"{caller.f_code.co_qualname}: {name}"


def watch_syncs(patch: pytest.MonkeyPatch, is_done: Callable[[str], bool]) -> None:
    """Each sync by its name; one that is not `is_done` returns as if it were."""
    real_fsync, real_sync = SimulatedOs.fsync, SimulatedOs.sync

    def fsync(self: SimulatedOs, fd: int) -> None:
        if is_done(asked_by()):
            real_fsync(self, fd)

    def sync(self: SimulatedOs) -> None:
        if is_done(asked_by()):
            real_sync(self)

    patch.setattr(SimulatedOs, "fsync", fsync)
    patch.setattr(SimulatedOs, "sync", sync)


def record_named_before_its_bytes_are_synced(patch: pytest.MonkeyPatch) -> None:
    real = durable_files.link_new

    def link_new(source: Path, target: Path) -> None:
        real(source, target)
        fd = durable_files.open_existing(target)
        durable_files.os.fsync(fd)  # type: ignore[attr-defined]  # the simulated one

    watch_syncs(patch, lambda name: name != "FilesystemBackend._write_synced: fsync")
    patch.setattr(durable_files, "link_new", link_new)


def record_before_blob(patch: pytest.MonkeyPatch) -> None:
    real_publish = filesystem.FileStagedBlob.publish
    real_discard = filesystem.FileStagedBlob.discard
    waiting: list[filesystem.FileStagedBlob] = []

    def discard(self: filesystem.FileStagedBlob) -> None:
        if self in waiting:
            waiting.remove(self)
            real_publish(self)
        real_discard(self)

    patch.setattr(filesystem.FileStagedBlob, "publish", lambda self: waiting.append(self))
    patch.setattr(filesystem.FileStagedBlob, "discard", discard)


def blobs_freed_before_the_task_is_deleted(patch: pytest.MonkeyPatch) -> None:
    real = store.PrefixStore.delete

    def delete(self: store.PrefixStore, task: str) -> list[str]:
        for version in self.task(task).versions:
            self._remove(version.digest)
        return real(self, task)

    patch.setattr(store.PrefixStore, "delete", delete)


def a_directory_that_exists_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    real = durable_files.make_dir

    def make_dir(path: Path) -> None:
        if not durable_files.exists(path):
            real(path)

    patch.setattr(durable_files, "make_dir", make_dir)


def leftovers_are_removed_before_they_are_told_by(patch: pytest.MonkeyPatch) -> None:
    real = filesystem.FilesystemBackend._recover

    def recover(self: filesystem.FilesystemBackend) -> None:
        durable_files.make_dir(self._tmp)
        for name in durable_files.names_in(self._tmp):
            durable_files.remove(self._tmp / name)
        real(self)

    patch.setattr(filesystem.FilesystemBackend, "_recover", recover)


def nothing_is_removed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(durable_files, "remove", lambda path: None)


def a_torn_audit_record_is_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimulatedOs, "ftruncate", lambda self, fd, length: None)


def an_audit_record_is_acknowledged_early(patch: pytest.MonkeyPatch) -> None:
    real = AuditLog.append
    waiting: list[dict[str, object]] = []

    def append(self: AuditLog, **fields: object) -> None:
        while waiting:
            real(self, **waiting.pop())
        waiting.append(fields)

    patch.setattr(AuditLog, "append", append)


WRONG_ORDERS: Final = (
    (record_named_before_its_bytes_are_synced, "promotion_and_rollback"),
    (record_before_blob, "first_upload"),
    (blobs_freed_before_the_task_is_deleted, "deletion"),
    (a_directory_that_exists_is_not_synced, "opening_an_audit_log"),
    (leftovers_are_removed_before_they_are_told_by, "first_upload"),
    (nothing_is_removed, "first_upload"),
    (a_torn_audit_record_is_left, "a_long_audit_record"),
    (an_audit_record_is_acknowledged_early, "audit_records_over_several_files"),
)
"""Each with a scenario that shows it."""
