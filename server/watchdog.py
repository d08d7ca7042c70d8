"""Looks whether the engine thread still lives and moves; if not, tells every client, and has the process end.

A task on the event loop, made by `server.process`. What a hung step holds can not be taken from it in this process: a
thread can not be ended, and the device is its own. So the process ends, with a code of which its supervisor starts it anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from server.http.services import Lifecycle

logger = logging.getLogger(__name__)

EXIT_ENGINE_DIED: Final = 70
EXIT_ENGINE_HANGS: Final = 75
TICK_SECONDS: Final = 0.2
_LONGEST_TICK_SECONDS: Final = 1.0
"""What one look may add to the time that the engine stood still: a process that was stopped itself saw nothing."""


class Watched(Protocol):
    """`server.engine.async_engine.AsyncEngine`."""

    @property
    def heartbeat(self) -> float: ...

    @property
    def died(self) -> bool: ...

    def end_streams(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the process must end, as clients read it, and with which code."""

    reason: str
    exit_code: int


class Watchdog:
    """`end` is called once, with the verdict, when every open request has been told."""

    def __init__(
        self,
        engine: Watched,
        lifecycle: Lifecycle,
        hang_seconds: float,
        end: Callable[[Verdict], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._lifecycle = lifecycle
        self._hang_seconds = hang_seconds
        self._end = end
        self._beat = engine.heartbeat
        self._still_seconds = 0.0
        self._looked = time.monotonic()

    async def run(self) -> None:
        """Looks until the engine can not go on; ends as `end` does."""
        verdict = None
        while verdict is None:
            await asyncio.sleep(TICK_SECONDS)
            verdict = self.look(time.monotonic())
        logger.critical("%s; the process ends with code %d", verdict.reason, verdict.exit_code)
        self._lifecycle.fault = verdict.reason
        self._engine.end_streams(f"{verdict.reason}; try again")
        await self._end(verdict)

    def look(self, now: float) -> Verdict | None:
        """What is to be said of the engine at monotonic `now`; None while it is well."""
        elapsed, self._looked = now - self._looked, now
        if self._engine.died:
            return Verdict("the engine has failed", EXIT_ENGINE_DIED)
        if self._engine.heartbeat != self._beat:
            self._beat, self._still_seconds = self._engine.heartbeat, 0.0
        else:
            self._still_seconds += min(elapsed, _LONGEST_TICK_SECONDS)
        if self._still_seconds > self._hang_seconds:
            return Verdict("the engine hangs", EXIT_ENGINE_HANGS)
        return None
