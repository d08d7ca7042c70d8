"""The increments of one request on their way to whoever reads them. Lives on the event loop.

Made and filled by `AsyncEngine`; read and closed by the HTTP layer or the offline commands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from server.engine.output_processor import OutputProcessor
from server.types import RequestOutput


class RequestStream(AsyncIterator[RequestOutput]):
    """The increments of one request, all choices interleaved, until each has a finish reason.

    Increments that a slow reader has not taken yet wait here; there are at most `max_tokens` per choice.
    """

    def __init__(self, processor: OutputProcessor, abort: Callable[[str], None]) -> None:
        self.processor = processor
        self._abort = abort
        self._queue: asyncio.Queue[RequestOutput | None] = asyncio.Queue()
        self._closed = False

    def put(self, output: RequestOutput) -> None:
        """Hands over an increment."""
        self._queue.put_nowait(output)

    def end(self) -> None:
        """No increment comes any more: lets a reader go that waits for one."""
        self._queue.put_nowait(None)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        output = None if self._closed else await self._queue.get()
        if output is None:
            self._closed = True
            raise StopAsyncIteration
        return output

    async def aclose(self) -> None:
        """Ends the stream; aborts the request if it still runs. May be called at any time, repeatedly."""
        self._closed = True
        self.end()
        if not self.processor.finished:
            self._abort(self.processor.request.request_id)
