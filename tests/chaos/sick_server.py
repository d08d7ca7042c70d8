"""`prefixd` whose engine falls ill by a signal: SIGUSR1, its next step raises; SIGUSR2, its next step does not end.

SIGHUP has it write down what it holds, for `tests.chaos.census`. Its steps take `STEP_SECONDS` at least, so that a tiny model has streams that last. Started by tests and `tests.chaos` in place of
`python -m server`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import server.cli
from server.engine.async_engine import AsyncEngine
from server.engine.core import EngineCore, StepResult

STEP_SECONDS: Final = 0.01
DIES: Final = signal.SIGUSR1
HANGS: Final = signal.SIGUSR2


def main() -> None:
    """The command line of `prefixd`."""
    illness: list[int] = []
    for number in (DIES, HANGS):
        signal.signal(number, lambda number, _: illness.append(number))
    engines: list[AsyncEngine] = []
    signal.signal(signal.SIGHUP, lambda *_: tell_census(engines[0]))
    healthy_start, healthy_step = AsyncEngine.start, EngineCore.step

    async def start(self: AsyncEngine) -> None:
        engines.append(self)
        await healthy_start(self)

    def step(self: EngineCore, inbox: Sequence[Any]) -> StepResult:
        if DIES in illness:
            raise SystemError("planted: the engine dies")
        if HANGS in illness:
            threading.Event().wait()
        time.sleep(STEP_SECONDS)
        return healthy_step(self, inbox)

    AsyncEngine.start = start  # type: ignore[method-assign] # the fault is put in here
    EngineCore.step = step  # type: ignore[method-assign] # the fault is put in here
    server.cli.main()


def tell_census(engine: AsyncEngine) -> None:
    """One line on stderr: asyncio's tasks, the engine's streams, and timers that wait for a request's deadline."""
    assert engine._loop is not None
    gc.collect()
    timers = sum(s._timer is not None for s in engine._streams.values())
    held = {
        "tasks": len(asyncio.all_tasks(engine._loop)),
        "streams": len(engine._streams),
        "timers": timers,
    }
    os.write(2, f"census:{json.dumps(held)}\n".encode())


if __name__ == "__main__":
    main()
