"""How busy the machine is with work that is not ours, read from Linux's own accounts.

The load average says nothing of that while a benchmark runs, since the benchmark itself fills the cores. So
the processor time of all processes is held against the time of this one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path


class OthersMeter:
    """Cores that others kept busy since this was made, on average."""

    def __init__(self) -> None:
        # Looking takes a moment, in which others work too: what they did must not count for longer than the time does.
        self._started = time.perf_counter()
        self._own = _own_seconds()
        self._busy = _busy_seconds()

    def cores(self) -> float:
        busy = _busy_seconds() - self._busy
        own = _own_seconds() - self._own
        return max(0.0, busy - own) / max(1e-3, time.perf_counter() - self._started)


def _busy_seconds() -> float:
    """Processor seconds of the whole machine since boot, those that a hypervisor took away included."""
    user, nice, system, _idle, _iowait, *interrupts_and_steal = (
        int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor seconds of this process and of its descendants, those that ended and were waited for included."""
    ended = os.times()
    return (
        time.process_time()
        + ended.children_user
        + ended.children_system
        + sum(_descendants_ticks(os.getpid())) / os.sysconf("SC_CLK_TCK")
    )


def _descendants_ticks(pid: int) -> Iterator[int]:
    """Ticks of each descendant that lives, with those of its own children that ended."""
    stats = {int(path.parent.name): _stat(path) for path in Path("/proc").glob("[0-9]*/stat")}
    family = {pid}
    while (
        found := {child for child, stat in stats.items() if stat and int(stat[1]) in family}
        - family
    ):
        family |= found
    for child in family - {pid}:
        yield sum(int(ticks) for ticks in stats[child][11:15])


def _stat(path: Path) -> list[str]:
    """The fields behind the program's name, which may hold spaces; none if the process is gone."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return []
