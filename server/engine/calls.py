"""Functions that must run on the engine thread, between two steps: whatever else needs the model.

`EngineCalls` is used on the event loop; `EngineCore.step` performs an `EngineCall` before it plans. The
scheduler never sees one. A call should be short: every running request waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, TypeVar

from server.errors import EngineStopped

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class EngineCall:
    """Run `function` and put what it returns or raises into `future`."""

    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def perform(self) -> None:
        """Engine thread. Never raises: a failing call is its caller's affair, and not the engine's."""
        if not self.future.set_running_or_notify_cancel():
            return  # the caller has gone
        try:
            result = self.function()
        except Exception as error:  # noqa: BLE001 - handed on to whoever waits
            with contextlib.suppress(InvalidStateError):  # `fail` has let the caller go meanwhile
                self.future.set_exception(error)
        else:
            with contextlib.suppress(InvalidStateError):
                self.future.set_result(result)


class EngineCalls:
    """The calls that the event loop waits for. `post` hands one to the engine thread."""

    def __init__(self, post: Callable[[EngineCall], None]) -> None:
        self._post = post
        self._open: set[EngineCall] = set()

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises on the engine thread; `EngineStopped` if it ends before."""
        call = EngineCall(function)
        self._open.add(call)
        self._post(call)
        try:
            result: T = await asyncio.wrap_future(call.future)
        finally:
            self._open.discard(call)
        return result

    def fail(self, reason: str) -> None:
        """Lets go of everyone who waits: the engine thread performs no call any more."""
        for call in self._open:
            if not call.future.done():
                call.future.set_exception(EngineStopped(reason))
