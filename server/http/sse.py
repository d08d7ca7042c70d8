"""Server-sent events: `data:` lines, an error as the last event but one, `[DONE]` the last where an API has it.

Runs on the event loop. FastAPI's own event response is not used: it sends keep-alive comments, which make
`vllm bench serve` drop every request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import PrefixdError
from server.http.disconnect import unless_gone
from server.http.error_responses import error_object
from server.http.json_text import json_bytes
from server.http.services import request_id_of

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
STALL_SECONDS: Final = 30.0
"""A reader that takes nothing for this long loses its stream, so that its request frees its blocks."""


@dataclass(frozen=True, slots=True)
class StreamStyle:
    """How a stream tells of an error once its status is gone, and what its last bytes are."""

    error_object: Callable[[Exception, str], dict[str, Any]]
    end: bytes


_OPENAI: Final = StreamStyle(error_object, DONE)
_HEADERS: Final = {"cache-control": "no-cache", "x-accel-buffering": "no"}
Events = AsyncGenerator[bytes, None]


def event(value: Any) -> bytes:
    """One event; JSON in ASCII has no line breaks, so it is one line."""
    return b"data: " + json_bytes(value) + b"\n\n"


class EventStream(Response):
    """Sends `first` and then `events`. `close` runs when the stream ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        events: Events,
        close: Callable[[], Awaitable[None]],
        *,
        request_id: str,
        headers: Mapping[str, str],
        style: StreamStyle,
    ) -> None:
        super().__init__(None, 200, {**_HEADERS, **headers})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._close = close
        self._request_id = request_id
        self._style = style

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        try:
            await unless_gone(receive, self._write(send))
        except (ClientDisconnect, TimeoutError):
            logger.info("request %s: the client left its stream", self._request_id)
        finally:
            await self._events.aclose()
            await self._close()

    async def _write(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        await _send(send, self._first)
        try:
            async for data in self._events:
                await _send(send, data)
        except PrefixdError as error:
            await _send(send, self._event_of(error))
        except (ClientDisconnect, TimeoutError):
            raise
        except Exception as error:  # the status line is gone: this is the only way left to tell
            logger.exception("request %s failed in its stream", self._request_id)
            await _send(send, self._event_of(error))
        await _send(send, self._style.end, more=False)

    def _event_of(self, error: Exception) -> bytes:
        return event(self._style.error_object(error, self._request_id))


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    async with asyncio.timeout(STALL_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def open_stream(
    request: Request,
    events: Events,
    close: Callable[[], Awaitable[None]],
    headers: Mapping[str, str],
    style: StreamStyle = _OPENAI,
) -> EventStream:
    """The answer to `request`, once there is a first event: a failure before it still has a status."""
    try:
        first = await unless_gone(request.receive, _first_of(events))
    except BaseException:
        await events.aclose()
        await close()
        raise
    return EventStream(
        first, events, close, request_id=request_id_of(request), headers=headers, style=style
    )


async def _first_of(events: Events) -> bytes:
    return await anext(events)
