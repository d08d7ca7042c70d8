"""Until when a request may take: what its client says, within what the server allows, from its arrival on.

Runs on the event loop; called by `server.http.generation`. The engine ends a request at its deadline by itself; here is
what comes before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request

from server.errors import DeadlineExceeded, InvalidParameter
from server.http.services import services_of

HEADER: Final = "x-request-timeout-ms"
_MAX_DIGITS: Final = 12


def deadline_of(request: Request) -> float:
    """Monotonic seconds. Raises `InvalidParameter` for a header that is no number of milliseconds."""
    seconds = services_of(request).max_request_seconds
    given = request.headers.get(HEADER)
    if given is not None:
        is_number = given.isascii() and given.isdecimal() and len(given) <= _MAX_DIGITS
        if not is_number or int(given) == 0:
            raise InvalidParameter(
                f"{HEADER}: expected a whole number of milliseconds, 1 or more", param=HEADER
            )
        seconds = min(seconds, int(given) / 1000)
    arrived: float = request.scope["prefixd.arrived"]
    return arrived + seconds


@contextlib.asynccontextmanager
async def within(deadline: float) -> AsyncIterator[None]:
    """Cancels what is done in it at the deadline, and raises `DeadlineExceeded`."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the request's time was over before it could begin") from None
