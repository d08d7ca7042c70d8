"""Every crash point of a history, and what is found there after it: kills and power losses, also during the recovery.

A `Subject` is what is under test: it recovers on what is left, says what it finds, and goes on working. A `Point` is a
moment of a history with the states that may be found after a crash there: before and after the change under way, or the
one that was acknowledged. Called by `test_crash_points` and `python -m tests.prefix_store.crash`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from prefix_store import audit_log, key_store
from prefix_store.backends import durable_files, filesystem
from tests.prefix_store.simulated_files import Disk, SimulatedOs


class CrashFault(AssertionError):
    """After a crash something is not as it was promised."""


@dataclass(frozen=True, slots=True)
class Point:
    """`allowed`: the states of the subject that may be found after a crash here."""

    disk: Disk
    allowed: tuple[Any, ...]


class Subject(Protocol):
    """What writes to the simulated files; each call is a process of its own, which just ends."""

    def recover(self, allowed: tuple[Any, ...]) -> Any:
        """Open on what is there; returns the state found. Raises unless it is one of `allowed`, or unsound."""
        ...

    def go_on(self) -> Any:
        """Open, make changes of every kind, and return the state after the last one was acknowledged."""
        ...


@contextmanager
def installed(simulated: SimulatedOs) -> Iterator[None]:
    """The simulated files in place of the real ones, wherever the store writes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (durable_files, filesystem, audit_log, key_store):
            patch.setattr(module, "os", simulated)
        for module in (filesystem, key_store):
            patch.setattr(module, "fcntl", simulated.fcntl)
        patch.setattr(filesystem, "secrets", simulated.secrets)
        yield


def moments(simulated: SimulatedOs, run: Callable[[], Any]) -> tuple[Any, list[Disk]]:
    """What `run` returned, and the disk before it and after each of its changes."""
    disks = [simulated.disk()]
    simulated.after_change = lambda: disks.append(simulated.disk())
    try:
        with installed(simulated):
            return run(), disks
    finally:
        simulated.after_change = lambda: None


class Explorer:
    """Checks the crashes of points, each different one once. `num_states`: how many those were."""

    def __init__(self, subject: Subject, *, recovery_crashes: int = 1) -> None:
        """`recovery_crashes`: how many further crashes may hit the recovery from the first."""
        self._subject = subject
        self._recovery_crashes = recovery_crashes
        self._seen: dict[Any, int] = {}
        self._went_on: set[Any] = set()
        self.num_points = 0
        self.num_states = 0

    def explore(self, points: Iterable[Point]) -> None:
        """Raises `CrashFault`, or what the subject raised, at the first crash that breaks a promise."""
        for point in points:
            self.num_points += 1
            self._crash(point, self._recovery_crashes)

    def _crash(self, point: Point, further: int) -> None:
        for disk in (point.disk, *point.disk.power_losses()):
            key = (disk.tree(), disk.pending, point.allowed)
            if self._seen.get(key, -1) < further:
                self._seen[key] = further
                self._check(Point(disk, point.allowed), further)

    def _check(self, point: Point, further: int) -> None:
        self.num_states += 1
        simulated = SimulatedOs(point.disk)
        found, disks = moments(simulated, lambda: self._subject.recover(point.allowed))
        self._check_that_it_goes_on(simulated.disk(), found)
        if further:
            for disk in disks:
                self._crash(Point(disk, point.allowed), further - 1)
        # What was found may have been told to somebody, so from now on nothing else may be found.
        self._crash(Point(simulated.disk(), (found,)), max(further - 1, 0))

    def _check_that_it_goes_on(self, disk: Disk, found: Any) -> None:
        key = (disk.tree(), disk.pending, found)
        if key in self._went_on:
            return
        self._went_on.add(key)
        simulated = SimulatedOs(disk)
        with installed(simulated):
            after = self._subject.go_on()
        forgetful = SimulatedOs(simulated.disk().with_effects(()))
        with installed(forgetful):
            self._subject.recover((after,))
