"""The streams of several prompts read as one. Runs on the event loop; called by `server.http.generation`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from server.http.services import OutputStream
from server.types import RequestOutput


async def merged(
    streams: Sequence[OutputStream],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """What the streams give, as it comes, each with its stream's number."""
    waiting = {
        asyncio.ensure_future(next_of(stream)): number for number, stream in enumerate(streams)
    }
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                number = waiting.pop(future)
                output = future.result()
                if output is not None:
                    waiting[asyncio.ensure_future(next_of(streams[number]))] = number
                    yield number, output
    finally:
        for future in waiting:
            future.cancel()


async def next_of(stream: OutputStream) -> RequestOutput | None:
    """A stream's next increment; None at its end."""
    try:
        return await stream.__anext__()
    except StopAsyncIteration:
        return None
