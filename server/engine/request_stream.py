"""The increments of one request on their way to whoever reads them. Lives on the event loop.

Made and filled by `AsyncEngine`; read and closed by the HTTP layer or the offline commands.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import reduce
from typing import Final

from server.engine.output_processor import OutputProcessor
from server.types import RequestOutput

MAX_WAITING: Final = 64
"""Increments that wait for a reader one by one; those of one who is further behind grow together."""


class RequestStream(AsyncIterator[RequestOutput]):
    """The increments of one request, all choices interleaved, until each has a finish reason.

    What a slow reader has not taken yet waits here: at most `MAX_WAITING` increments and one a choice, and in them the text
    and token ids that the request has gained.
    """

    def __init__(self, processor: OutputProcessor, abort: Callable[[str], None]) -> None:
        self.processor = processor
        self._abort = abort
        self._waiting: deque[list[RequestOutput]] = deque()  # each to be read as one
        self._arrived = asyncio.Event()
        self._ended = False
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None

    def put(self, output: RequestOutput) -> None:
        """Hands over an increment."""
        if len(self._waiting) < MAX_WAITING or not self._join_last(output):
            self._waiting.append([output])
        self._arrived.set()

    def end(self) -> None:
        """No increment comes any more: lets a reader go that waits for one."""
        self._ended = True
        self._arrived.set()
        if self._timer is not None:
            self._timer.cancel()

    def expire_after(self, seconds: float, expire: Callable[[str], None]) -> None:
        """Calls `expire` with the request's id, unless the stream ends before."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, expire, self.processor.request.request_id)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._closed:
            if self._waiting:
                return reduce(RequestOutput.followed_by, self._waiting.popleft())
            if self._ended:
                break
            self._arrived.clear()
            await self._arrived.wait()
        self._closed = True
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Ends the stream; aborts the request if it still runs. May be called at any time, repeatedly."""
        self._closed = True
        self._waiting.clear()
        self.end()
        if not self.processor.finished:
            self._abort(self.processor.request.request_id)

    def _join_last(self, output: RequestOutput) -> bool:
        """Makes `output` a part of the last increment of its choice that waits, if there is one."""
        for parts in reversed(self._waiting):
            if parts[0].index == output.index:
                _append(parts, output)
                return True
        return False


def _append(parts: list[RequestOutput], output: RequestOutput) -> None:
    """Parts of like length are joined, so that there are few, and no token is copied more often than the lengths double."""
    while parts and len(parts[-1].token_ids) <= len(output.token_ids):
        output = parts.pop().followed_by(output)
    parts.append(output)
