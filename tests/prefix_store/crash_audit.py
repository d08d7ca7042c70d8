"""Histories of an audit log, to be crashed everywhere, and what must be found after it. Called by `crash`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prefix_store.audit_log import AuditLog, verify
from prefix_store.backends import durable_files
from tests.prefix_store.crash_points import CrashFault, Point, installed, moments
from tests.prefix_store.simulated_files import Disk, SimulatedOs

DIRECTORY: Final = Path("/store/audit")
MAX_FILE_BYTES: Final = 700  # two records to a file, so that rotation is everywhere
_LONG: Final = "x" * 300  # a record longer than what one write takes

Records = tuple[int, ...]
"""The numbers that the appended records carry, in order: the state of an audit log."""


class AuditSubject:
    """`AuditLog` over its directory."""

    def recover(self, allowed: tuple[Records, ...]) -> Records:
        open_log()
        return check_records(allowed)

    def go_on(self) -> Records:
        log, (found,) = open_log(), (read_records(),)
        for number in (100, 101, 102):
            log.append(number=number)
        return check_records(((*found, 100, 101, 102),))


def open_log() -> AuditLog:
    return AuditLog(DIRECTORY, max_file_bytes=MAX_FILE_BYTES)


def check_records(allowed: tuple[Records, ...]) -> Records:
    """The records, once the chain is proved whole."""
    report = verify(DIRECTORY)
    if not report.ok:
        raise CrashFault(str(report))
    found = read_records()
    if found not in allowed:
        raise CrashFault(f"found {found}, allowed {allowed}")
    return found


def read_records() -> Records:
    paths = [DIRECTORY / name for name in durable_files.names_in(DIRECTORY)]
    lines = [line for path in paths for line in bytes(durable_files.read_file(path)).splitlines()]
    return tuple(json.loads(line)["number"] for line in lines)


class AuditHistory:
    """An audit log that lives through a scenario. `points`: the crash points so far."""

    def __init__(self) -> None:
        self.simulated = SimulatedOs(Disk())
        self.points: list[Point] = []
        self._log: AuditLog | None = None
        with installed(self.simulated):
            durable_files.make_dir(DIRECTORY.parent)

    def open(self) -> None:
        """A new process opens what the last one left."""
        before = self._records() if self._log is not None else ()
        self._record(self._open, before, before)

    def append(self, number: int, **more: str) -> None:
        log = self._log
        assert log is not None
        before = self._records()
        self._record(lambda: log.append(number=number, **more), before, (*before, number))

    def _open(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log = open_log()

    def _records(self) -> Records:
        with installed(self.simulated):
            return read_records()

    def _record(self, run: Callable[[], None], before: Records, after: Records) -> None:
        _, disks = moments(self.simulated, run)
        self.points += [Point(disk, (before, after)) for disk in disks]
        self.points.append(Point(self.simulated.disk(), (after,)))


def opening_an_audit_log(history: AuditHistory) -> None:
    history.open()


def audit_records_over_several_files(history: AuditHistory) -> None:
    history.open()
    for number in range(6):
        history.append(number)


def a_long_audit_record(history: AuditHistory) -> None:
    history.open()
    history.append(1)
    history.append(2, text=_LONG)
    history.append(3)


def audit_records_of_several_processes(history: AuditHistory) -> None:
    for number in range(5):
        history.open()
        history.append(number)


AUDIT_SCENARIOS: Final = {
    scenario.__name__: scenario
    for scenario in (
        opening_an_audit_log,
        audit_records_over_several_files,
        a_long_audit_record,
        audit_records_of_several_processes,
    )
}


def audit_points(name: str) -> list[Point]:
    """The crash points of a scenario."""
    history = AuditHistory()
    AUDIT_SCENARIOS[name](history)
    return history.points
