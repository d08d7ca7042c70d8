"""A server that answers `POST /generate` as a test tells it, on the loop of the generator under test."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from loadtest.open_loop import Destination
from loadtest.wire import Origin

DONE = b"data: [DONE]\n\n"


@dataclass
class Exchange:
    """One request that came; what the script writes goes to the client as it is."""

    body: dict[str, Any]
    head: str
    number: int
    connection: int
    writer: asyncio.StreamWriter

    def begin(self, status: str = "200 OK", *headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", "transfer-encoding: chunked", *headers]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")

    def write(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, num_tokens: int, **more: Any) -> None:
        self.write(
            b"data: " + json.dumps({"token_ids": [1] * num_tokens, **more}).encode() + b"\n\n"
        )

    def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")

    def answer(self, tier: str = "device") -> None:
        """All that was asked for, token by token."""
        self.begin()
        count = self.body["max_tokens"]
        for number in range(count):
            self.event(1, **({"prefix_tier": tier} if number == count - 1 else {}))
        self.write(DONE)
        self.end()

    def refuse(self, status: str, code: str) -> None:
        self.begin(status)
        self.write(json.dumps({"error": {"code": code, "message": "no"}}).encode())
        self.end()

    def drop(self) -> None:
        """Ends the connection."""
        self.writer.transport.abort()


Script = Callable[[Exchange], Awaitable[None]]


@dataclass
class FakeServer:
    """What came, in the order in which it came."""

    script: Script
    exchanges: list[Exchange] = field(default_factory=list)
    num_connections: int = 0
    port: int = 0

    def destination(self, *tasks: str, max_open: int = 1000) -> Destination:
        origin = Origin.of(f"http://127.0.0.1:{self.port}/behind/")
        return Destination(origin, {"authorization": "Bearer k"}, tasks or ("poet",), 50, max_open)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        connection = self.num_connections
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = json.loads(await reader.readexactly(int(fields["content-length"])))
                number = len(self.exchanges)
                exchange = Exchange(body, head, number, connection, writer)
                self.exchanges.append(exchange)
                await self.script(exchange)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def fake_server(script: Script) -> AsyncIterator[FakeServer]:
    """Listens on loopback until the block is left."""
    fake = FakeServer(script)
    listening = await asyncio.start_server(fake.serve, "127.0.0.1", 0, backlog=4096)
    fake.port = listening.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        listening.close()
        await listening.wait_closed()
