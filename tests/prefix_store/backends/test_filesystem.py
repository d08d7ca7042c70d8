"""What only a directory can get wrong: locks, leftovers, permissions, damage, and the order of syncs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prefix_store.backends import durable_files, filesystem
from prefix_store.backends.base import DiskUsage
from prefix_store.backends.filesystem import FilesystemBackend
from prefix_store.errors import PrefixUnavailable, StoreFailed, StoreLocked
from prefix_store.spec import digest_of
from tests.prefix_store.backends.test_contract import LOG, publish


def files_under(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def blob_path(root: Path, data: bytes) -> Path:
    name = digest_of(data).removeprefix("sha256:")
    return root / "blobs" / name[:2] / name


def test_the_layout_is_the_documented_one_and_private(tmp_path: Path) -> None:
    root = tmp_path / "made" / "with" / "parents"
    backend = FilesystemBackend(root)
    publish(backend, b"abc")
    backend.append_record(LOG, 1, b"one")
    name = digest_of(b"abc").removeprefix("sha256:")
    assert files_under(root) == [f"blobs/{name[:2]}/{name}", "lock", f"log/{LOG}/{1:020d}.json"]
    for path in (root, *root.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0
    backend.close()


def test_a_second_owner_is_refused_and_may_follow_the_first(tmp_path: Path) -> None:
    first = FilesystemBackend(tmp_path)
    with pytest.raises(StoreLocked):
        FilesystemBackend(tmp_path)
    code = (
        "import sys, pathlib\n"
        "from prefix_store.backends.filesystem import FilesystemBackend\n"
        "from prefix_store.errors import StoreLocked\n"
        "try: FilesystemBackend(pathlib.Path(sys.argv[1]))\n"
        "except StoreLocked: sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 7
    first.close()
    first.close()
    FilesystemBackend(tmp_path).close()


def test_a_closed_backend_writes_nothing_any_more(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    backend.close()
    with pytest.raises(StoreFailed, match="closed"):
        backend.stage()
    with pytest.raises(StoreFailed, match="closed"):
        backend.append_record(LOG, 1, b"one")


def test_a_blob_that_was_staged_before_the_closing_is_not_published(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    staged = backend.stage()
    staged.write(b"abc")
    backend.close()
    with pytest.raises(StoreFailed, match="closed"):
        staged.publish()
    staged.discard()
    assert files_under(tmp_path) == ["lock"]


@pytest.mark.parametrize("operation", ["publish", "append"])
def test_closing_waits_for_a_commit_and_the_usage_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Otherwise the commit would end in a directory that another process owns by then."""
    backend = FilesystemBackend(tmp_path)
    syncing, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    link_new = durable_files.link_new

    def slow(source: Path, target: Path) -> None:
        syncing.set()
        assert go_on.wait(10)
        link_new(source, target)

    def commit() -> None:
        if operation == "publish":
            publish(backend, b"abc")
        else:
            backend.append_record(LOG, 1, b"one")

    def close() -> None:
        backend.close()
        closed.set()

    monkeypatch.setattr(durable_files, "link_new", slow)
    with ThreadPoolExecutor(3) as pool:
        committing = pool.submit(commit)
        assert syncing.wait(10)
        closing = pool.submit(close)
        usage = pool.submit(backend.usage).result(5)
        early = closed.wait(0.05)
        go_on.set()
        committing.result(10)
        closing.result(10)

    assert usage == DiskUsage(0, 0)
    assert not early
    with pytest.raises(StoreFailed, match="closed"):
        backend.append_record(LOG, 2, b"two")


def test_opening_sweeps_leftovers_and_ignores_foreign_files(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    backend.stage().write(b"never finished")
    publish(backend, b"abc")
    backend.append_record(LOG, 1, b"one")
    backend.close()
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    (tmp_path / "blobs" / "README").write_text("hello")
    (tmp_path / "log" / "README").write_text("hello")
    (tmp_path / "log" / LOG / "1.json.bak").write_text("hello")
    blob_path(tmp_path, b"abc").with_suffix(".bak").write_text("hello")

    backend = FilesystemBackend(tmp_path)

    assert list((tmp_path / "tmp").iterdir()) == []
    assert backend.usage() == DiskUsage(3, 1)
    assert backend.read_logs() == {LOG: {1: b"one"}}
    backend.close()


def test_uploading_a_damaged_blob_again_heals_it(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    digest = publish(backend, b"abc")
    for damage in (b"abX", b"ab", b""):
        blob_path(tmp_path, b"abc").write_bytes(damage)
        assert bytes(backend.read_blob(digest)) == damage
        publish(backend, b"abc")
        assert backend.read_blob(digest) == b"abc"
    assert list((tmp_path / "tmp").iterdir()) == []
    backend.close()


def test_a_blob_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path / "store")
    digest = publish(backend, b"abc")
    (tmp_path / "elsewhere").write_bytes(b"abc")
    path = blob_path(tmp_path / "store", b"abc")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PrefixUnavailable):
        backend.read_blob(digest)
    backend.close()


def test_a_record_that_can_not_be_read_is_an_empty_payload(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    backend.append_record(LOG, 1, b"one")
    record = tmp_path / "log" / LOG / f"{1:020d}.json"
    record.unlink()
    record.symlink_to("nowhere")
    assert backend.read_logs() == {LOG: {1: b""}}
    backend.close()


def test_a_directory_that_can_not_be_used_is_a_clean_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StoreFailed) as caught:
        FilesystemBackend(tmp_path / "file" / "store")
    assert str(tmp_path) not in str(caught.value)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blobs").write_text("not a directory")
    with pytest.raises(StoreFailed):
        FilesystemBackend(tmp_path / "store")
    (tmp_path / "store" / "blobs").unlink()
    FilesystemBackend(tmp_path / "store").close()  # the failed opening kept no lock


def test_a_staging_that_shrank_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    staged = backend.stage()
    staged.write(b"hello world")
    (path,) = (tmp_path / "tmp").iterdir()
    os.truncate(path, 5)
    assert staged.read() == b"hello"
    staged.discard()
    backend.close()


class SyncTracker:
    """Stands in for `os`, and knows which bytes and names would survive a power cut."""

    def __init__(self) -> None:
        self._paths: dict[int, str] = {}
        self._unsynced_files: set[str] = set()
        self.unsynced_names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        fd = os.open(path, flags, mode)
        self._paths[fd] = str(path)
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        self._unsynced_files.add(self._paths[fd])
        return os.write(fd, data[:2])  # partial writes are legal

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        path = self._paths[fd]
        self._unsynced_files.discard(path)
        self.unsynced_names = {n for n in self.unsynced_names if os.path.dirname(n) != path}

    def sync(self) -> None:
        self.unsynced_names.clear()

    def link(self, source: Path, target: Path, *, follow_symlinks: bool) -> None:
        os.link(source, target, follow_symlinks=follow_symlinks)
        assert str(source) not in self._unsynced_files, "a name was given to bytes that may be lost"
        self.unsynced_names.add(str(target))

    def mkdir(self, path: Path, mode: int) -> None:
        os.mkdir(path, mode)
        self.unsynced_names.add(str(path))


def test_whatever_a_call_acknowledged_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL can not show a missing fsync (the page cache survives it), so the calls are watched."""
    tracker = SyncTracker()
    monkeypatch.setattr(durable_files, "os", tracker)
    monkeypatch.setattr(filesystem, "os", tracker)
    root = tmp_path / "new" / "store"
    backend = FilesystemBackend(root)
    assert not tracker.unsynced_names
    for blob in (b"abc", b"abc", b"defgh"):
        publish(backend, blob)
        assert not tracker.unsynced_names
    for index in (1, 2):
        backend.append_record(LOG, index, b"payload")
        assert not tracker.unsynced_names
    blob_path(root, b"abc").write_bytes(b"damaged")
    publish(backend, b"abc")
    assert not tracker.unsynced_names
    backend.close()


def test_names_left_unsynced_by_a_killed_process_are_synced_at_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FilesystemBackend(tmp_path)
    publish(backend, b"abc")
    backend.append_record(LOG, 1, b"one")
    backend.stage()  # a commit that was cut short has not removed its staging yet
    backend.close()
    tracker = SyncTracker()
    tracker.unsynced_names = {str(path) for path in tmp_path.rglob("*") if path.name != "lock"}
    monkeypatch.setattr(durable_files, "os", tracker)
    monkeypatch.setattr(filesystem, "os", tracker)
    FilesystemBackend(tmp_path).close()
    assert not tracker.unsynced_names
