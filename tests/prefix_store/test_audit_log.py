"""The audit log: every change to what was written is seen, a crash costs at most the record under way."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from prefix_store.audit_log import AuditLog, verify
from prefix_store.errors import AuditDamaged, StoreFailed, StoreFull


def write(directory: Path, count: int, *, max_file_bytes: int = 600) -> AuditLog:
    """A log of `count` records over several files."""
    log = AuditLog(directory, max_file_bytes=max_file_bytes)
    for number in range(count):
        log.append(who="key", action="upload", task=f"task-{number}", status=201)
    log.close()
    return log


def log_files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def test_what_was_appended_is_verified_over_all_files(tmp_path: Path) -> None:
    log = write(tmp_path, 9)

    report = verify(tmp_path)

    assert report.ok
    assert (report.num_records, report.head) == (9, log.head)
    assert len(log_files(tmp_path)) > 2
    lines = b"".join(path.read_bytes() for path in log_files(tmp_path)).splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["seq"] for record in records] == list(range(1, 10))
    assert [record["prev"] for record in records[1:]] == [r["hash"] for r in records[:-1]]
    assert records[3]["task"] == "task-3"


def test_an_empty_log_is_whole(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit").close()
    assert verify(tmp_path / "audit").ok


def test_the_chain_goes_on_after_reopening(tmp_path: Path) -> None:
    for _ in range(6):
        write(tmp_path, 1)
    write(tmp_path, 4, max_file_bytes=10_000)
    assert (verify(tmp_path).num_records, verify(tmp_path).fault) == (10, None)


def test_every_changed_byte_is_seen(tmp_path: Path) -> None:
    write(tmp_path, 4)
    rng = random.Random(1)
    for path in log_files(tmp_path):
        whole = path.read_bytes()
        for position in range(len(whole)):
            other = bytes([whole[position] ^ rng.randrange(1, 256)])
            path.write_bytes(whole[:position] + other + whole[position + 1 :])
            assert not verify(tmp_path).ok, (path.name, position)
        path.write_bytes(whole)
    assert verify(tmp_path).ok


def test_every_removed_byte_is_seen(tmp_path: Path) -> None:
    write(tmp_path, 2, max_file_bytes=10_000)
    (path,) = log_files(tmp_path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + whole[position + 1 :])
        assert not verify(tmp_path).ok, position


def swap_lines(lines: list[bytes]) -> list[bytes]:
    return [lines[1], lines[0], *lines[2:]]


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "first removed": lambda lines: lines[1:],
    "middle removed": lambda lines: [lines[0], *lines[2:]],
    "reordered": swap_lines,
    "repeated": lambda lines: [lines[0], *lines],
    "one put in again later": lambda lines: [*lines, lines[1]],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_line_can_not_be_moved_or_removed(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    write(tmp_path, 4, max_file_bytes=10_000)
    (path,) = log_files(tmp_path)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    assert not verify(tmp_path).ok


def test_a_whole_file_can_not_be_removed_or_renamed(tmp_path: Path) -> None:
    write(tmp_path, 9)
    first, second, *_ = log_files(tmp_path)
    kept = second.read_bytes()
    second.unlink()
    assert not verify(tmp_path).ok
    (tmp_path / f"{99:020d}.jsonl").write_bytes(kept)
    assert not verify(tmp_path).ok
    second.write_bytes(kept)
    (tmp_path / f"{99:020d}.jsonl").unlink()
    assert verify(tmp_path).ok
    first.unlink()
    assert not verify(tmp_path).ok


def test_the_server_goes_on_where_old_files_were_moved_away_and_verify_says_so(
    tmp_path: Path,
) -> None:
    write(tmp_path, 9)
    *old, _ = log_files(tmp_path)
    for path in old:
        path.unlink()
    write(tmp_path, 1)
    assert "does not begin at record 1" in str(verify(tmp_path).fault)


def test_a_cut_off_end_is_seen_by_who_noted_the_head(tmp_path: Path) -> None:
    log = write(tmp_path, 4, max_file_bytes=10_000)
    (path,) = log_files(tmp_path)
    noted = log.head
    assert verify(tmp_path, noted).found_head
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert verify(tmp_path).ok
    assert not verify(tmp_path, noted).found_head


@pytest.mark.parametrize("max_file_bytes", [1, 10_000])
def test_a_torn_last_line_is_reported_and_cut_off_when_opened(
    tmp_path: Path, max_file_bytes: int
) -> None:
    write(tmp_path, 3, max_file_bytes=max_file_bytes)
    last = log_files(tmp_path)[-1]
    whole = last.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for end in range(start + 1, len(whole)):
        last.write_bytes(whole[:end])
        report = verify(tmp_path)
        assert (report.num_records, report.fault) == (2, None)
        assert report.torn_bytes == end - start
        assert not report.ok
        log = AuditLog(tmp_path, max_file_bytes=max_file_bytes)
        assert log.torn_bytes == end - start
        assert verify(tmp_path).ok
        log.append(who="key")
        log.close()
        assert (verify(tmp_path).ok, verify(tmp_path).num_records) == (True, 3)


def test_a_last_line_with_zero_bytes_is_torn_too(tmp_path: Path) -> None:
    """After a power loss a file may be as long as what was written, and empty where it did not arrive."""
    write(tmp_path, 3, max_file_bytes=10_000)
    (path,) = log_files(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines[2])):
        path.write_bytes(b"".join(lines[:2]) + bytes(cut) + lines[2][cut:])
        assert verify(tmp_path).torn_bytes == len(lines[2])
        log = AuditLog(tmp_path, max_file_bytes=10_000)
        assert log.torn_bytes == len(lines[2])
        log.close()
        assert (verify(tmp_path).ok, verify(tmp_path).num_records) == (True, 2)


def test_zero_bytes_before_the_last_line_are_damage(tmp_path: Path) -> None:
    write(tmp_path, 3, max_file_bytes=10_000)
    (path,) = log_files(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + bytes(9) + lines[1][9:] + lines[2])
    assert verify(tmp_path).fault == "record 2 is torn"
    with pytest.raises(AuditDamaged):
        AuditLog(tmp_path)


def test_a_log_whose_end_was_changed_is_not_continued(tmp_path: Path) -> None:
    write(tmp_path, 3, max_file_bytes=10_000)
    (path,) = log_files(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"task-2", b"task-9"))
    with pytest.raises(AuditDamaged, match="record 3: it is not what its hash says"):
        AuditLog(tmp_path)


def test_a_record_that_could_not_be_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path)
    log.append(who="key")
    real = os.write

    def half(fd: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "no room")
        return real(fd, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(StoreFull):
            log.append(who="key", task="x" * 100)
    assert verify(tmp_path).ok
    log.append(who="key")
    log.close()
    assert (verify(tmp_path).num_records, verify(tmp_path).ok) == (2, True)
    with pytest.raises(StoreFailed):
        log.append(who="key")
