"""Clients that hold on: some never read their answer, some send their head or body a byte at a time. Used by `tests.chaos`."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from tests.chaos.leavers import request_bytes
from tests.chaos.streams import body

_RECEIVE_BYTES: Final = 4096
"""The kernel would take an answer of a tiny model as a whole for a client that never asks for it."""


@dataclass
class Cut:
    """How long the server let them hold on."""

    num_open: int = 0
    slowest_sender_seconds: float = 0.0
    slowest_reader_seconds: float = 0.0


@dataclass
class SlowClients:
    """All of them, by socket."""

    readers: list[socket.socket] = field(default_factory=list)
    senders: dict[socket.socket, Iterator[bytes]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def wait_until_cut(self, seconds: float) -> Cut:
        """Senders send on, a byte a second, readers do not read, until the server has closed all of them."""
        cut, deadline = Cut(), time.monotonic() + seconds
        senders, readers = dict(self.senders), set(self.readers)
        while (senders or readers) and time.monotonic() < deadline:
            for client in [client for client, data in senders.items() if not _send(client, data)]:
                del senders[client]
                cut.slowest_sender_seconds = time.monotonic() - self.started
            for client in [client for client in readers if _is_reset(client)]:
                readers.discard(client)
                cut.slowest_reader_seconds = time.monotonic() - self.started
            time.sleep(1.0)
        cut.num_open = len(senders) + len(readers)
        return cut


@contextlib.contextmanager
def slow_clients(
    host: tuple[str, int], *, num_never_readers: int, num_slow_senders: int
) -> Iterator[SlowClients]:
    """Connected, and already slow."""
    clients = SlowClients()
    with contextlib.ExitStack() as stack:
        for number in range(num_never_readers):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            client.connect(host)
            client.sendall(_much(number))
            clients.readers.append(client)
        for number in range(num_slow_senders):
            client = stack.enter_context(socket.create_connection(host))
            head, content = request_bytes(body(5))
            at_once, slowly = (head, content) if number % 2 else (b"", head)
            client.sendall(at_once)
            clients.senders[client] = iter([bytes([byte]) for byte in slowly])
        yield clients


def _much(number: int) -> bytes:
    """A request, or several at once, whose answers no buffer on the way can hold.

    Few of them have the engine generate: what the others cost is to be their slowness, and not their work.
    """
    if number % 25 == 0:
        return b"".join(request_bytes(body(480)))
    return b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 60


def _send(client: socket.socket, data: Iterator[bytes]) -> bool:
    """One more byte; False once the server has closed."""
    if select.select([client], [], [], 0)[0]:
        return False  # an answer, to what is not whole: it was refused
    try:
        client.sendall(next(data, b""))
    except OSError:
        return False
    return True


def _is_reset(client: socket.socket) -> bool:
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
