"""How busy the machine is with work that is not ours, read from Linux's own accounts.

The load average says nothing of that while a benchmark runs, since the benchmark itself fills the cores. So
the processor time of all processes is held against the time of this one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


class OthersMeter:
    """Cores that others kept busy since this was made, on average."""

    def __init__(self) -> None:
        self._busy = _busy_seconds()
        self._own = time.process_time()
        self._started = time.perf_counter()

    def cores(self) -> float:
        busy = _busy_seconds() - self._busy
        own = time.process_time() - self._own
        return max(0.0, busy - own) / max(1e-3, time.perf_counter() - self._started)


def _busy_seconds() -> float:
    """Processor seconds of the whole machine since boot, those that a hypervisor took away included."""
    user, nice, system, _idle, _iowait, *interrupts_and_steal = (
        int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")
