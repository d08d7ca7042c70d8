"""uvicorn with our protocol on a loopback socket: what a stranger may do before anyone asks for a key."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from server import connections
from server.connections import MAX_HEAD_BYTES, MAX_NUM_HEADERS, GuardedProtocol

SHORT = 0.2
PATIENCE = 10.0  # of a test, on a busy machine
REQUEST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"


@dataclass
class Listening:
    """A server in a thread. `gone`: the paths whose client was seen to leave; `headers`: of the last request."""

    port: int = 0
    server: uvicorn.Server | None = None
    gone: list[str] = field(default_factory=list)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        if scope["path"] == "/early":
            await _answer(send, b"early")
        elif scope["path"] == "/large":
            await _answer(send, bytes(2**23), close=True)
        elif scope["path"] == "/flood":
            await self._flood(receive, send)
        else:
            size, more = 0, True
            while more:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
            self.headers = scope["headers"]
            await _answer(send, str(size).encode())

    async def _flood(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        left = asyncio.ensure_future(receive())
        while not left.done():
            part = {"type": "http.response.body", "body": bytes(2**14), "more_body": True}
            sending = asyncio.ensure_future(send(part))
            await asyncio.wait({sending, left}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)
        self.gone.append("/flood")

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port))
        client.settimeout(PATIENCE)
        return client

    def num_connections(self) -> int:
        assert self.server is not None
        return len(self.server.server_state.connections)

    def wait_for(self, num_connections: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.num_connections() != num_connections:
            assert time.monotonic() < deadline, f"{self.num_connections()} connections are open"
            time.sleep(0.01)


async def _answer(send: Any, body: bytes, *, close: bool = False) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    """Deadlines of 0.2 s, but for what a test sets back."""
    for name in ("HEAD_SECONDS", "REST_SECONDS", "STALL_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(connections, name, SHORT)
    listening = Listening()
    config = uvicorn.Config(
        listening.app,
        http=GuardedProtocol,
        interface="asgi3",
        log_config=None,
        lifespan="off",
        ws="none",
    )
    listening.server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listening.port = listener.getsockname()[1]
        thread = threading.Thread(target=listening.server.run, args=([listener],))
        thread.start()
        try:
            yield listening
        finally:
            listening.server.should_exit = True
            thread.join(PATIENCE)
        assert not thread.is_alive()


def everything(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(2**16):
            received += part
    return received


def status_and_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def trickle(client: socket.socket, data: bytes, seconds: float = PATIENCE) -> None:
    """A byte at a time, over and over, until the server closes or the time is over."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            for byte in data:
                client.sendall(bytes([byte]))
                time.sleep(SHORT / 10)


def test_a_connection_that_says_nothing_is_closed(server: Listening) -> None:
    with server.connect() as client:
        assert everything(client) == b""
    server.wait_for(0)


def test_a_head_that_trickles_is_answered_with_408_however_steadily_it_comes(
    server: Listening,
) -> None:
    with server.connect() as client:
        client.sendall(REQUEST)
        sender = threading.Thread(target=trickle, args=(client, b"X-A: b\r\n"))
        sender.start()
        assert status_and_code(everything(client)) == (408, "head_too_slow")
        client.close()
        sender.join()


@pytest.mark.parametrize(
    "head",
    [
        REQUEST + b"X: " + b"y" * MAX_HEAD_BYTES,
        REQUEST + b"X: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n",
        REQUEST + b"X: y\r\n" * MAX_NUM_HEADERS + b"\r\n",
        b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n",
        b"GET /" + b"x" * MAX_HEAD_BYTES * 2,
    ],
    ids=["endless header", "large header", "many headers", "long path", "endless path"],
)
@pytest.mark.parametrize("piece", [1000, 2**20])
def test_a_head_that_is_too_large_is_answered_with_431(
    server: Listening, monkeypatch: pytest.MonkeyPatch, head: bytes, piece: int
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", PATIENCE)
    with server.connect() as client:
        with contextlib.suppress(OSError):
            for start in range(0, len(head), piece):
                client.sendall(head[start : start + piece])
        assert status_and_code(everything(client)) == (431, "head_too_large")
    assert server.headers == []


def test_the_largest_head_is_served(server: Listening) -> None:
    with server.connect() as client:
        client.sendall(REQUEST + b"X: " + b"y" * (MAX_HEAD_BYTES - 100) + b"\r\nConnection: close")
        client.sendall(b"\r\n\r\n")
        assert everything(client).endswith(b"\r\n\r\n0")


def test_what_is_no_http_is_answered_with_400_in_json(server: Listening) -> None:
    with server.connect() as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert status_and_code(everything(client)) == (400, "bad_request")


def test_empty_lines_do_not_keep_an_idle_connection(server: Listening) -> None:
    with server.connect() as client:
        client.sendall(REQUEST + b"Content-Length: 2\r\n\r\nhi")
        assert client.recv(1000).endswith(b"2")
        sender = threading.Thread(target=trickle, args=(client, b"\r\n"))
        sender.start()
        assert everything(client) == b""
        client.close()
        sender.join()


def test_a_kept_connection_may_wait_longer_than_a_head_may_take(server: Listening) -> None:
    with server.connect() as client:
        for _ in range(3):
            client.sendall(REQUEST + b"Content-Length: 2\r\n\r\nhi")
            assert client.recv(1000).endswith(b"2")
            time.sleep(2 * SHORT)


def test_a_body_may_take_longer_than_a_head(server: Listening) -> None:
    """It is for the route to say how long."""
    with server.connect() as client:
        client.sendall(REQUEST + b"Content-Length: 30\r\nConnection: close\r\n\r\n")
        for _ in range(30):
            client.sendall(b"x")
            time.sleep(SHORT / 10)
        assert everything(client).endswith(b"30")


def test_a_body_that_nobody_waits_for_any_more_is_cut(server: Listening) -> None:
    with server.connect() as client:
        client.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        sender = threading.Thread(target=trickle, args=(client, b"x"))
        sender.start()
        assert everything(client).endswith(b"early")
        client.close()
        sender.join()
    server.wait_for(0)


def test_a_body_in_chunks_of_one_byte_is_served(server: Listening) -> None:
    with server.connect() as client:
        client.sendall(REQUEST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        client.sendall(b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n")
        assert everything(client).endswith(b"10000")


def test_trailers_are_bounded_and_become_no_headers(server: Listening) -> None:
    chunked = REQUEST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n1\r\nx\r\n0\r\n"
    with server.connect() as client:
        client.sendall(chunked + b"Authorization: Bearer late\r\n\r\n")
        assert everything(client).endswith(b"1")
    assert b"authorization" not in dict(server.headers)
    with server.connect() as client:
        with contextlib.suppress(OSError):
            for _ in range(100):
                client.sendall((chunked if _ == 0 else b"") + b"X: " + b"y" * 1000)
        assert status_and_code(everything(client)) == (431, "head_too_large")


def test_a_reader_that_takes_nothing_is_cut_and_its_request_hears_of_it(server: Listening) -> None:
    with server.connect() as client:
        client.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for(1)
        server.wait_for(0)
        deadline = time.monotonic() + PATIENCE
        while not server.gone:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_reader_that_takes_nothing_can_not_hold_a_closing_connection(server: Listening) -> None:
    with server.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for(1)
        server.wait_for(0)


def test_a_reader_that_is_slow_gets_everything(server: Listening) -> None:
    """It takes longer than a stall may, but it takes."""
    with server.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        received = 0
        while part := client.recv(2**18):
            received += len(part)
            time.sleep(SHORT / 20)
        assert received > 2**23
