"""Clients that leave at any moment: before, amid and after their request, while it waits, computes and streams.

Raw sockets, because a client library would tidy up. Used by tests and by `tests.chaos`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from typing import Any, Final

from tests.chaos.streams import body

PHASES: Final = (
    "silent",
    "amid the head",
    "amid the body",
    "at once",
    "soon",
    "amid the answer",
    "half closed",
    "whole",
)
_RESET: Final = struct.pack("ii", 1, 0)  # close() sends RST


def request_bytes(fields: dict[str, Any]) -> tuple[bytes, bytes]:
    """Head and body."""
    content = json.dumps(fields).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(content)
    )
    return head, content


def random_request(rng: random.Random, models: list[str]) -> dict[str, Any]:
    """Short and long prompts and answers, streamed or not, of one choice or several, of any task."""
    return body(
        rng.choice([1, 5, 40, 200]),
        stream=rng.random() < 0.7,
        n=rng.choice([1, 1, 3]),
        model=rng.choice(models),
        prompt=[rng.randrange(3, 40) for _ in range(rng.choice([1, 10, 100, 250]))],
    )


async def leave(port: int, rng: random.Random, models: list[str]) -> str:
    """One client. Returns the phase in which it left."""
    phase = rng.choice(PHASES)
    head, content = request_bytes(random_request(rng, models))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        if phase == "amid the head":
            writer.write(head[: rng.randrange(1, len(head))])
        elif phase == "amid the body":
            writer.write(head + content[: rng.randrange(len(content))])
        elif phase != "silent":
            writer.write(head + content)
        await writer.drain()
        if phase == "half closed":
            writer.write_eof()
        if phase == "whole":
            await reader.readuntil(b"\r\n\r\n")
        elif phase == "amid the answer":
            await reader.read(rng.randrange(1, 3000))
        if phase not in ("at once", "silent"):
            await asyncio.sleep(rng.expovariate(1 / 0.03))
    connection = writer.get_extra_info("socket")
    if rng.random() < 0.5:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return phase


async def leave_often(
    port: int, models: list[str], *, count: int, at_once: int, seed: int
) -> dict[str, int]:
    """`count` clients, `at_once` at a time. Returns how many left in which phase."""
    rng, left = random.Random(seed), dict.fromkeys(PHASES, 0)
    numbers = iter(range(count))

    async def one_after_another() -> None:
        for number in numbers:
            left[await leave(port, random.Random(rng.random() + number), models)] += 1

    await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    return left
