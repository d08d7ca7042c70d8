"""HTTP/1.1 as a load generator needs it: thousands of open answers on one thread, a callback for each piece.

Runs on the event loop; used by `open_loop`. Not httpx2, which the client commands use: that takes a coroutine and its
pool's lock for each request and five times the CPU time for each token's event (`docs/lab-log.md`), and a generator that is
slower than the server measures itself. httptools is what the server parses with. No proxies, no redirects: what is
between would be measured too.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

import httptools

from loadtest.errors import BadLoad

CONNECT_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the server is. `path` is what stands before each route: empty, or `/behind/a/proxy`."""

    host: str
    port: int
    tls: bool
    path: str
    host_header: str

    @classmethod
    def of(cls, url: str) -> Origin:
        """The origin in `url`. Raises `BadLoad` for what is no HTTP URL."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise BadLoad(f"{url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadLoad(f"{url}: expected a URL like http://127.0.0.1:8000")
        if parts.query or parts.fragment or parts.username:
            raise BadLoad(f"{url}: expected a URL without user, query and fragment")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/")
        return cls(parts.hostname, port or (443 if tls else 80), tls, path, parts.netloc)

    @property
    def url(self) -> str:
        """To put a route behind."""
        return f"{'https' if self.tls else 'http'}://{self.host_header}{self.path}"

    def post(self, route: str, headers: dict[str, str], body: bytes) -> bytes:
        """A whole request with a JSON body."""
        lines = [
            f"POST {self.path}{route} HTTP/1.1",
            f"host: {self.host_header}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class Answer(Protocol):
    """Who takes an answer as it comes. Exactly one of the last two ends it."""

    def on_status(self, status: int) -> None: ...

    def on_body(self, data: bytes) -> None: ...

    def on_end(self) -> None: ...

    def on_failure(self, reason: str) -> None: ...


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time. `on_free` is called when it can take the next one."""

    def __init__(
        self, on_free: Callable[[Connection], None], on_lost: Callable[[Connection], None]
    ) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._on_free = on_free
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._request = b""
        self._reused = False
        self._silent = True  # whether nothing of the answer has come yet

    def begin(self, request: bytes, answer: Answer) -> None:
        """Sends a request; what comes back goes to `answer`."""
        assert self._transport is not None, "connected"
        assert self._answer is None, "one exchange at a time"
        self._answer, self._request, self._silent = answer, request, True
        self._transport.write(request)

    def unanswered(self) -> tuple[bytes, Answer] | None:
        """The exchange that a server lost which closed a connection it had kept open: worth another connection."""
        if self._answer is None or not self._reused or not self._silent:
            return None
        answer, self._answer = self._answer, None
        return self._request, answer

    def abort(self) -> None:
        """Ends it at once; an answer under way fails."""
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none of asyncio's

    def data_received(self, data: bytes) -> None:
        self._silent = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {type(error).__name__}")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(self)  # first: it may take over the exchange
        self._fail(f"connection lost: {type(exc).__name__}" if exc else "connection closed")

    def _fail(self, reason: str) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.on_failure(reason)

    # ---- httptools ----------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.on_status(self._parser.get_status_code())

    def on_body(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.on_body(data)

    def on_message_complete(self) -> None:
        answer, self._answer, self._request = self._answer, None, b""
        if answer is not None:
            answer.on_end()
        if self._parser.should_keep_alive():
            self._reused = True
            self._on_free(self)
        else:
            self.abort()


class Connections:
    """As many connections as there are answers under way, up to `max_open`; kept for the next request.

    Beyond `max_open` a request fails at once: waiting for a descriptor would close the loop.
    """

    def __init__(self, origin: Origin, max_open: int) -> None:
        self._origin = origin
        self._max_open = max_open
        self._tls = ssl.create_default_context() if origin.tls else None
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._closing = False
        self._all_lost = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Connections, also those that are being made."""
        return len(self._open) + len(self._connecting)

    def send(self, request: bytes, answer: Answer) -> None:
        """Sends on a connection that is free, or on a new one."""
        if self._idle:
            self._idle.pop().begin(request, answer)
        elif self.num_open >= self._max_open:
            answer.on_failure(f"not sent: {self._max_open} streams open, no descriptor left")
        else:
            connecting = asyncio.get_running_loop().create_task(self._connect(request, answer))
            self._connecting.add(connecting)
            connecting.add_done_callback(self._connecting.discard)

    async def aclose(self) -> None:
        """Ends every connection; answers under way fail."""
        self._closing = True
        for connecting in self._connecting:
            connecting.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in list(self._open):
            connection.abort()
        if self._open:
            await self._all_lost.wait()

    async def _connect(self, request: bytes, answer: Answer) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self._free, self._lost),
                    self._origin.host,
                    self._origin.port,
                    ssl=self._tls,
                )
        except TimeoutError:
            answer.on_failure("not connected in time")
        except OSError as error:
            answer.on_failure(f"can not connect: {type(error).__name__}")
        except asyncio.CancelledError:
            answer.on_failure("not connected before the end")
            raise
        else:
            self._open.add(connection)
            connection.begin(request, answer)

    def _free(self, connection: Connection) -> None:
        self._idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._closing and not self._open:
            self._all_lost.set()
        exchange = None if self._closing else connection.unanswered()
        if exchange is not None:
            self.send(*exchange)
