"""Questions to the engine thread whose answers are awaited: each gets a ticket, each answer finds its asker.

On the event loop; called by `AsyncEngine`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from server.engine.messages import Answer, FollowPin, Message, PinTask, ReportDevice
from server.errors import EngineStopped, PinRefused
from server.types import DeviceReport, PinState, PrefixRef


class Orders:
    """What was asked and not answered yet. Whoever stops the engine must call `fail`."""

    def __init__(self, post: Callable[[Message], None]) -> None:
        self._post = post
        self._tickets = itertools.count()
        self._asked: dict[int, asyncio.Future[object]] = {}
        self._stopped: str | None = None

    async def pin(self, ref: PrefixRef, ttl_seconds: float | None) -> PinState:
        """Raises `PinRefused`, `EngineStopped`."""
        state = await self._ask(lambda ticket: PinTask(ticket, ref, ttl_seconds))
        assert isinstance(state, PinState)
        if state.refusal is not None:
            raise PinRefused(state.refusal)
        return state

    async def follow_pin(self, ref: PrefixRef) -> str | None:
        """Why a pin was given up; None if it was not. Raises `EngineStopped`."""
        state = await self._ask(lambda ticket: FollowPin(ticket, ref))
        return state.refusal if isinstance(state, PinState) else None

    async def report(self) -> DeviceReport:
        """What is resident. Raises `EngineStopped`."""
        report = await self._ask(ReportDevice)
        assert isinstance(report, DeviceReport)
        return report

    def answer(self, answer: Answer) -> None:
        """Hands an answer over; its asker may have gone."""
        asked = self._asked.get(answer.ticket)
        if asked is not None and not asked.done():
            asked.set_result(answer.value)

    def fail(self, reason: str) -> None:
        """Nobody answers any more, now or later."""
        self._stopped = reason
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(EngineStopped(reason))

    async def _ask(self, message: Callable[[int], Message]) -> object:
        """The answer to the message made for a ticket. Raises `EngineStopped`."""
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        ticket = next(self._tickets)
        future = self._asked[ticket] = asyncio.get_running_loop().create_future()
        self._post(message(ticket))
        try:
            return await future
        finally:
            del self._asked[ticket]
