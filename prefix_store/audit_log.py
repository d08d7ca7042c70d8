"""The audit log: who changed what, and who was refused; append-only, hash-chained JSON lines.

    audit/<%020d>.jsonl     named by the number of the first record in it

A line is one JSON object that ends with its own SHA-256 over everything before that field. It holds its number
(`seq`, from 1) and the hash of the line before it (`prev`), through every rotation, so no byte can be changed, no
line removed or moved, without `verify` seeing it. Only the end can be cut off unseen: note the head hash
elsewhere now and then, and have `verify` look for it.

One process appends (the store's lock sees to that), from any thread; anybody may verify.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from prefix_store.backends import durable_files as files
from prefix_store.errors import AuditDamaged, StoreFailed

MAX_FILE_BYTES: Final = 8 * 2**20
MAX_LINE_BYTES: Final = 64 * 1024
_GENESIS: Final = "0" * 64
_FILE_NAME: Final = re.compile(r"[0-9]{20}\.jsonl")
_END: Final = re.compile(rb',"hash":"([0-9a-f]{64})"\}')
_END_BYTES: Final = len(b',"hash":""}') + 64


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What a check found. `fault`: the first thing wrong, if any; the counts are up to there.

    `torn_bytes`: length of a last line without an end, or with zero bytes in it, as a crash leaves it: a file may have
    become longer before all that was written reached the disk.
    """

    num_records: int = 0
    head: str = _GENESIS
    fault: str | None = None
    torn_bytes: int = 0
    found_head: bool = False

    @property
    def ok(self) -> bool:
        return self.fault is None and self.torn_bytes == 0


class AuditLog:
    """Open for appending. Invariant: what is on disk is whole lines, the last of which has `_head`."""

    def __init__(self, directory: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Open or make the log in `directory`, and cut off a torn last line.

        Raises `AuditDamaged` when its last file is not what was written, `StoreFailed`, `StoreFull`.
        """
        self._directory = directory
        self._max_file_bytes = max_file_bytes
        self._lock = threading.Lock()  # guards what follows; held while a record is made durable
        self._fd = -1
        self._size = 0
        self._failed = False
        with files.translated_errors():
            files.make_dir(directory)
            self._seq, self._head, self.torn_bytes = self._recover()

    @property
    def head(self) -> str:
        """Hash of the last record."""
        return self._head

    def append(self, **fields: Any) -> None:
        """Add a record; durable on return. Raises `StoreFull` or `StoreFailed`; then it is not there."""
        with self._lock, files.translated_errors():
            if self._failed:
                raise StoreFailed("the audit log can not be written; restart the server")
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line, head = _sealed({"seq": self._seq + 1, "prev": self._head, "time": now, **fields})
            self._ready_for(len(line))
            try:
                files.write_all(self._fd, line)
                os.fsync(self._fd)
            except OSError:
                self._undo()
                raise
            self._size += len(line)
            self._seq, self._head = self._seq + 1, head

    def close(self) -> None:
        """Close the file. Harmless when repeated."""
        with self._lock:
            if self._fd >= 0:
                files.close_quietly(self._fd)
                self._fd = -1
            self._failed = True

    def _ready_for(self, num_bytes: int) -> None:
        """An open file with room; a new one, whose name lasts, when the present one is full."""
        if self._fd >= 0 and (not self._size or self._size + num_bytes <= self._max_file_bytes):
            return
        path = self._directory / f"{self._seq + 1:020d}.jsonl"
        fd = files.create(path)
        try:
            files.sync_dir(self._directory)
        except OSError:
            files.close_quietly(fd)
            files.remove(path)
            raise
        if self._fd >= 0:
            files.close_quietly(self._fd)
        self._fd, self._size = fd, 0

    def _undo(self) -> None:
        """Take a record back that may be there in part; if that fails too, no other may follow it."""
        try:
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)
            os.fsync(self._fd)
        except OSError:
            self._failed = True

    def _recover(self) -> tuple[int, str, int]:
        """Number and hash of the last record, and the length of what was cut off behind it."""
        names = _file_names(self._directory)
        if not names:
            return 0, _GENESIS, 0
        path = self._directory / names[-1]
        report = _check_files(self._directory, names[-1:], from_start=_first_record(names[-1]) == 1)
        if report.fault is not None:
            raise AuditDamaged(f"the audit log is damaged: {report.fault}; prefixd audit verify")
        self._fd = files.open_for_appending(path)
        self._size = os.fstat(self._fd).st_size - report.torn_bytes
        if report.torn_bytes:
            os.ftruncate(self._fd, self._size)
        # Whoever wrote this may have been killed before it lasted, or before the file's name did.
        os.fsync(self._fd)
        files.sync_dir(self._directory)
        if not self._size:  # a crash right after a rotation
            return self._recover_before(names, report.torn_bytes)
        first = _first_record(names[-1])
        return first + report.num_records - 1, report.head, report.torn_bytes

    def _recover_before(self, names: list[str], torn_bytes: int) -> tuple[int, str, int]:
        if len(names) == 1:
            return 0, _GENESIS, torn_bytes
        report = _check_files(self._directory, names[-2:-1], from_start=False)
        if not report.ok:
            raise AuditDamaged(f"the audit log is damaged: {report.fault}; prefixd audit verify")
        return _first_record(names[-1]) - 1, report.head, torn_bytes


def verify(directory: Path, head: str | None = None) -> AuditReport:
    """Check every record from the first. `head`: a hash noted earlier, to be looked for on the way.

    Raises `StoreFailed` when the files can not be read.
    """
    with files.translated_errors():
        return _check_files(directory, _file_names(directory), from_start=True, wanted=head)


def _file_names(directory: Path) -> list[str]:
    return [name for name in files.names_in(directory) if _FILE_NAME.fullmatch(name)]


def _first_record(name: str) -> int:
    return int(name.partition(".")[0])


def _check_files(
    directory: Path, names: list[str], from_start: bool, wanted: str | None = None
) -> AuditReport:
    """The chain through these files; without `from_start` the first line's `prev` is taken as given."""
    count, head, found = 0, _GENESIS if from_start else None, wanted == _GENESIS
    seq = 0 if from_start or not names else _first_record(names[0]) - 1
    for name in names:
        if _first_record(name) != seq + 1:
            return AuditReport(
                count, head or _GENESIS, f"file {name} does not begin at record {seq + 1}"
            )
        for line, is_last in _lines(directory / name):
            if b"\0" in line or not line.endswith(b"\n"):
                if name == names[-1] and is_last and len(line) <= MAX_LINE_BYTES:
                    return AuditReport(count, head or _GENESIS, None, len(line), found)
                return AuditReport(count, head or _GENESIS, f"record {seq + 1} is torn", 0, found)
            fault, own = _check_line(line[:-1], seq + 1, head)
            if fault is not None:
                return AuditReport(count, head or _GENESIS, f"record {seq + 1}: {fault}", 0, found)
            seq, count, head = seq + 1, count + 1, own
            found = found or own == wanted
    return AuditReport(count, head or _GENESIS, found_head=found)


def _lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Each line, bounded in length, and whether it is the last."""
    with contextlib.closing(os.fdopen(files.open_existing(path), "rb")) as file:
        line = file.readline(MAX_LINE_BYTES + 1)
        while line:
            following = file.readline(MAX_LINE_BYTES + 1)
            yield line, not following
            line = following


def _check_line(line: bytes, seq: int, prev: str | None) -> tuple[str | None, str]:
    """What is wrong with a line, if anything, and its hash."""
    body, end = line[:-_END_BYTES], _END.fullmatch(line[-_END_BYTES:])
    if end is None:
        return "it does not end with its hash", ""
    own = end[1].decode()
    if hashlib.sha256(body).hexdigest() != own:
        return "it is not what its hash says", own
    try:
        fields = json.loads(body + b"}")
        number, before = fields["seq"], fields["prev"]
    except (ValueError, KeyError, TypeError):
        return "it is no record", own
    if number != seq:
        return f"it has the number {number}", own
    if prev is not None and before != prev:
        return "it does not follow the record before it", own
    return None, own


def _sealed(fields: dict[str, Any]) -> tuple[bytes, str]:
    """The line for a record, and its hash."""
    body = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()[:-1]
    head = hashlib.sha256(body).hexdigest()
    line = body + b',"hash":"' + head.encode() + b'"}\n'
    assert len(line) <= MAX_LINE_BYTES, "whoever appends bounds the fields"
    return line, head
