"""Each system call of each change may fail, for want of room or for a broken disk: a clean error, and nothing changed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefix_store import audit_log
from prefix_store.audit_log import AuditLog, verify
from prefix_store.backends import durable_files, filesystem
from prefix_store.errors import PrefixStoreError, PrefixUnavailable, StoreFailed, StoreFull
from prefix_store.store import PrefixStore
from tests.prefix_store.builders import TINY_BASE, make_artifact

CALLS = {
    "open", "write", "fsync", "sync", "link", "mkdir", "preadv", "pread", "close", "unlink", "stat",
    "lstat", "fstat", "listdir", "ftruncate", "lseek",
}  # fmt: skip
READS = {"open", "fstat", "preadv", "close"}
TIDYING = {"close", "unlink"}  # what is left behind is swept at the next opening
CODES = [(errno.ENOSPC, StoreFull), (errno.EIO, StoreFailed)]
ONE, TWO, THREE = (make_artifact(num_virtual_tokens=1, seed=seed) for seed in (1, 2, 3))

Change = Callable[[PrefixStore], object]


class FaultyOs:
    """Stands in for `os`; the call number `fail_at` fails. A failing `close` closes all the same."""

    def __init__(self, fail_at: int, code: int) -> None:
        self._fail_at = fail_at
        self._code = code
        self.num_calls = 0
        self.failed: str | None = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            if self.num_calls != self._fail_at:
                return real(*args, **kwargs)
            self.failed = name
            if name == "close":
                real(*args, **kwargs)
            raise OSError(self._code, "injected", "/a/secret/path")

        return call


@contextmanager
def failing(faulty: FaultyOs) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (durable_files, filesystem, audit_log):
            patch.setattr(module, "os", faulty)
        yield


def error_of(run: Callable[[], object]) -> PrefixStoreError | None:
    try:
        run()
    except PrefixStoreError as error:
        return error
    return None


def open_store(root: Path) -> PrefixStore:
    return PrefixStore.open(root, TINY_BASE, host_cache_bytes=0)


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def prepare(store: PrefixStore) -> None:
    """Versions 1 (live before) and 2 (live) of a task, 3 on trial, and a task that was deleted."""
    for data in (ONE, TWO):
        store.put("task", data)
    store.put("task", THREE, activate=False)
    store.set_canary("task", 3, 0.5)
    store.put("gone", ONE)
    store.delete("gone")


FOUR = make_artifact(num_virtual_tokens=1, seed=4)
WRITES: dict[str, Change] = {
    "new version": lambda store: store.put("task", FOUR),
    "new version that is not activated": lambda store: store.put("task", FOUR, activate=False),
    "first version": lambda store: store.put("other", FOUR),
    "known bytes": lambda store: store.put("task", ONE),
    "bytes of another task": lambda store: store.put("other", ONE),
    "upload after a deletion": lambda store: store.put("gone", FOUR),
    "promotion": lambda store: store.promote("task", 1),
    "rollback": lambda store: store.rollback("task"),
    "canary": lambda store: store.set_canary("task", 1, 0.25),
    "end of the canary": lambda store: store.end_canary("task"),
    "deletion": lambda store: store.delete("task"),
}
# These read a blob first. One that can not be read is no failure of an upload, which has the bytes.
READ_FIRST = {"promotion", "rollback", "canary"}
HEAL = {"known bytes", "bytes of another task"}


@pytest.mark.parametrize(("code", "kind"), CODES)
@pytest.mark.parametrize("name", WRITES)
def test_each_call_of_a_change_may_fail_and_then_nothing_changed(
    tmp_path: Path, name: str, code: int, kind: type[PrefixStoreError]
) -> None:
    failed = set()
    for fail_at in range(1, 1000):
        root = tmp_path / str(fail_at)
        store = open_store(root)
        prepare(store)
        before, logs = store.tasks(), listing(root / "log")
        faulty = FaultyOs(fail_at, code)
        with failing(faulty):
            error = error_of(lambda store=store: WRITES[name](store))  # type: ignore[misc]
        if faulty.failed is None:
            assert error is None
            store.close()
            break
        failed.add(faulty.failed)
        if error is None:
            assert faulty.failed in TIDYING | (READS if name in HEAL else set())
        else:
            assert type(error) is kind or (
                type(error) is PrefixUnavailable and name in READ_FIRST and faulty.failed in READS
            )
            assert "secret" not in str(error)
            assert store.tasks() == before
            assert listing(root / "log") == logs
            assert faulty.failed == "unlink" or listing(root / "tmp") == []
        check_after_reopening(store, root, name, error)
    assert failed >= {"open", "write", "fsync", "link", "close", "unlink"}


def check_after_reopening(
    store: PrefixStore, root: Path, name: str, error: PrefixStoreError | None
) -> None:
    """The same tasks, all readable; and what failed can be done now."""
    expected = store.tasks()
    store.close()
    store = open_store(root)
    assert store.tasks() == expected
    assert listing(root / "tmp") == []
    digests = {version.digest for task in expected for version in task.versions}
    assert store.stats().disk_entries == len(digests)
    for digest in digests:
        store.load(digest)
    assert error is None or error_of(lambda: WRITES[name](store)) is None
    store.close()


@pytest.mark.parametrize(("code", "kind"), CODES)
def test_each_call_of_healing_a_damaged_blob_may_fail_and_the_next_upload_heals_it(
    tmp_path: Path, code: int, kind: type[PrefixStoreError]
) -> None:
    for fail_at in range(1, 1000):
        root = tmp_path / str(fail_at)
        store = open_store(root)
        digest = store.put("task", ONE).version.digest
        before = store.tasks()
        (blob,) = (root / "blobs").glob("*/*")
        blob.write_bytes(ONE[:-1])
        faulty = FaultyOs(fail_at, code)
        with failing(faulty):
            error = error_of(lambda store=store: store.put("task", ONE))  # type: ignore[misc]
        # A damaged blob that can not be removed is in the way of its own replacement.
        wanted = StoreFailed if faulty.failed == "unlink" else kind
        assert error is None or type(error) is wanted
        assert store.tasks() == before
        store.put("task", ONE)
        assert store.load(digest).prefix.digest == digest
        store.close()
        if faulty.failed is None:
            break
    assert fail_at > 10


@pytest.mark.parametrize(("code", "kind"), CODES)
@pytest.mark.parametrize("is_new", [True, False])
def test_each_call_of_opening_may_fail_and_the_next_opening_finds_everything(
    tmp_path: Path, code: int, kind: type[PrefixStoreError], is_new: bool
) -> None:
    failed = set()
    for fail_at in range(1, 1000):
        root = tmp_path / str(fail_at) / "store"
        expected = []
        if not is_new:
            store = open_store(root)
            store.put("task", ONE)
            expected = store.tasks()
            store.begin_upload().write(b"never finished")
            store.close()
        faulty, opened = FaultyOs(fail_at, code), list[PrefixStore]()
        with failing(faulty):
            error = error_of(lambda root=root, to=opened: to.append(open_store(root)))  # type: ignore[misc]
        for store in opened:
            assert faulty.failed is None or faulty.failed in TIDYING | READS
            store.close()
        assert error is None or (type(error) is kind and "secret" not in str(error))
        store = open_store(root)
        assert store.tasks() == expected
        assert store.load(expected[0].versions[0].digest) if expected else not store.tasks()
        assert listing(root / "tmp") == []
        store.close()
        if faulty.failed is None:
            break
        failed.add(faulty.failed)
    assert failed >= {"open", "fsync", "close", "listdir"}


@pytest.mark.parametrize(("code", "kind"), CODES)
def test_each_call_of_the_audit_log_may_fail_and_its_chain_holds(
    tmp_path: Path, code: int, kind: type[PrefixStoreError]
) -> None:
    """Opening, appending and going over to a new file; a record that was refused is not there."""
    failed = set()
    for fail_at in range(1, 1000):
        directory = tmp_path / str(fail_at)
        for number in range(3):
            log = AuditLog(directory, max_file_bytes=400)
            log.append(number=number)
            log.close()
        faulty = FaultyOs(fail_at, code)
        with failing(faulty):
            errors, done = append_to(directory)
        assert all(type(error) in (kind, StoreFailed) for error in errors)
        assert not any("secret" in str(error) for error in errors)
        log = AuditLog(directory, max_file_bytes=400)
        log.append(number=-1)
        log.close()
        report = verify(directory)
        assert (report.ok, report.num_records) == (True, 3 + done + 1)
        if faulty.failed is None:
            assert not errors
            break
        failed.add(faulty.failed)
        assert len(errors) >= (faulty.failed not in TIDYING)
    assert failed >= {"open", "write", "fsync", "listdir", "fstat"}


def append_to(directory: Path) -> tuple[list[PrefixStoreError], int]:
    """What went wrong in opening the log and appending four records, and how many are there."""
    errors, done, logs = [], 0, list[AuditLog]()
    opening = error_of(lambda: logs.append(AuditLog(directory, max_file_bytes=400)))
    if opening is not None:
        return [opening], 0
    for number in range(4):
        error = error_of(lambda number=number: logs[0].append(number=number))  # type: ignore[misc]
        if error is None:
            done += 1
        else:
            errors.append(error)
    logs[0].close()
    return errors, done
