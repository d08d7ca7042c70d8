"""When the engine can not go on: who is told what, and what is not taken for a hang."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from server.http.services import Lifecycle
from server.watchdog import (
    EXIT_ENGINE_DIED,
    EXIT_ENGINE_HANGS,
    TICK_SECONDS,
    Verdict,
    Watchdog,
)


@dataclass
class Engine:
    heartbeat: float = 0.0
    died: bool = False
    ended: list[str] = field(default_factory=list)

    def end_streams(self, reason: str) -> None:
        self.ended.append(reason)


async def _nothing(_: Verdict) -> None:
    pass


def watchdog_of(engine: Engine, hang_seconds: float = 5.0) -> Watchdog:
    return Watchdog(engine, Lifecycle(), hang_seconds, _nothing)


@pytest.mark.parametrize(
    ("died", "hang_seconds", "reason", "code"),
    [
        (True, 100.0, "the engine has failed", EXIT_ENGINE_DIED),
        (False, 0.05, "the engine hangs", EXIT_ENGINE_HANGS),
    ],
)
def test_clients_and_probes_are_told_before_the_process_ends(
    died: bool, hang_seconds: float, reason: str, code: int
) -> None:
    engine, lifecycle = Engine(died=died), Lifecycle(ready=True)
    ends: list[Verdict] = []

    async def end(verdict: Verdict) -> None:
        assert engine.ended == [f"{reason}; try again"]
        assert lifecycle.fault == reason
        ends.append(verdict)

    watchdog = Watchdog(engine, lifecycle, hang_seconds, end)
    asyncio.run(asyncio.wait_for(watchdog.run(), 10))

    assert ends == [Verdict(reason, code)]


def test_an_engine_that_moves_is_left_alone_however_long_it_runs() -> None:
    engine = Engine()
    watchdog, now = watchdog_of(engine), time.monotonic()

    for _ in range(1000):
        now += TICK_SECONDS
        engine.heartbeat += 1 if _ % 20 == 0 else 0  # a step of 4 s
        assert watchdog.look(now) is None


def test_a_step_that_outlasts_its_time_is_a_hang() -> None:
    watchdog, now = watchdog_of(Engine()), time.monotonic()

    verdicts = [watchdog.look(now + TICK_SECONDS * tick) for tick in range(40)]

    assert verdicts[20] is None
    assert verdicts[30] == Verdict("the engine hangs", EXIT_ENGINE_HANGS)


def test_a_process_that_was_stopped_itself_does_not_blame_its_engine() -> None:
    engine = Engine()
    watchdog = watchdog_of(engine)

    assert watchdog.look(time.monotonic() + 3600) is None, "SIGSTOP, a paused container"
    engine.heartbeat += 1
    assert watchdog.look(time.monotonic() + 7200) is None
