"""prefixd as a client meets it: `prefixd serve` in a process of its own, spoken to over loopback.

The client is asyncio's bare streams: it shares the cores with the server, so what it does for each event is
little. Events are parsed when the clock has stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2

from benchmarks.contest import Call
from benchmarks.token_times import steady_gaps
from benchmarks.workload import Request

_ADMIN_KEY: Final = "benchmark-admin-key"
_START_SECONDS: Final = 240.0  # a machine may be busy


class HttpServer:
    """A server process; every request is a streamed `POST /v1/completions` with a connection of its own."""

    name: Final = "http"
    description: Final = "prefixd serve, each answer streamed to a connection of its own"

    def __init__(
        self, model_dir: Path, directory: Path, *, kv_cache_bytes: int, threads: int
    ) -> None:
        """Starts it; `start_seconds` is the time until /readyz says yes. Its store and log are in `directory`."""
        directory.mkdir(parents=True)
        self._log = directory / "server.log"
        self._port = _free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        command = [
            *(sys.executable, "-m", "server", "serve", "--port", str(self._port)),
            *("--model", str(model_dir), "--device", "cpu", "--store", str(directory / "store")),
            *("--kv-cache-bytes", str(kv_cache_bytes), "--num-threads", str(threads)),
            *("--admin-key", _ADMIN_KEY),
            "--no-prompt-cache",  # rounds repeat the same prompts, and each is to compute them
        ]
        started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        self.start_seconds: Final = time.perf_counter() - started

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        with httpx2.Client(base_url=self._url) as client:
            while time.monotonic() < deadline and self._process.poll() is None:
                with contextlib.suppress(httpx2.TransportError):
                    if client.get("/readyz").status_code == 200:
                        return
                time.sleep(0.02)
        raise RuntimeError(f"prefixd serve did not get ready:\n{self._log.read_text()}")

    def upload(self, artifacts: Mapping[str, bytes]) -> None:
        """Publishes each task's artifact."""
        headers = {"Authorization": f"Bearer {_ADMIN_KEY}"}
        with httpx2.Client(base_url=self._url, headers=headers, timeout=60.0) as client:
            for task, data in artifacts.items():
                client.put(f"/admin/v1/tasks/{task}", content=data).raise_for_status()

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """One call: the server takes all at once."""
        return [tuple(requests)]

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        """Sends all requests, reads all streams to their ends."""
        return asyncio.run(self._serve(requests, output_len))

    async def _serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        bodies = [_body(request, output_len) for request in requests]
        started = time.perf_counter()
        events = await asyncio.gather(*(self._stream(body, started) for body in bodies))
        seconds = time.perf_counter() - started
        answers = [_Answer.of(stream) for stream in events]
        return Call(
            requests=requests,
            tokens=tuple(answer.tokens for answer in answers),
            first_token_seconds=tuple(answer.token_seconds[0] for answer in answers),
            seconds=seconds,
            decode_step_seconds=steady_gaps([answer.token_seconds for answer in answers]),
        )

    async def _stream(self, body: bytes, started: float) -> list[tuple[float, bytes]]:
        """The lines that hold events, with the seconds at which they came."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"expected 200, got {status!r} {await reader.read()!r}")
        events = []
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                events.append((time.perf_counter() - started, line))
        writer.close()
        return events

    def close(self) -> None:
        """Asks it to stop, and waits."""
        self._process.terminate()
        self._process.wait(timeout=30)


def _body(request: Request, output_len: int) -> bytes:
    return json.dumps(
        {
            "model": request.task,
            "prompt": request.prompt_token_ids,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
    ).encode()


@dataclass(frozen=True, slots=True)
class _Answer:
    tokens: tuple[int, ...]
    token_seconds: tuple[float, ...]

    @classmethod
    def of(cls, events: Sequence[tuple[float, bytes]]) -> _Answer:
        """An event may bring several tokens, which came at one time then."""
        tokens: list[int] = []
        seconds: list[float] = []
        for moment, line in events:
            event: Any = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(f"the server answered {event['error']}")
            for choice in event["choices"]:
                tokens += choice["token_ids"]
                seconds += [moment] * len(choice["token_ids"])
        return cls(tuple(tokens), tuple(seconds))


def _free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
