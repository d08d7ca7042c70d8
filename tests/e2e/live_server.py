"""A real `prefixd serve` in a subprocess, on a free loopback port, for the end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

ADMIN_KEY = "test-admin-key"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
START_SECONDS = 60.0


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class LiveServer:
    """A running server process; `output` is where it writes what a person would see."""

    url: str
    process: subprocess.Popen[bytes]
    output: Path

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30.0)

    def metrics(self) -> str:
        """The scraped text."""
        with self.client() as client:
            return client.get("/metrics").text


@contextlib.contextmanager
def live_server(
    directory: Path, *flags: str, program: tuple[str, ...] = ("-m", "server")
) -> Iterator[LiveServer]:
    """Starts the server, waits until it is ready, and has it shut down by SIGTERM in the end."""
    port = free_port()
    output = directory / f"server-{port}.log"
    command = [sys.executable, *program, "serve", "--port", str(port), *flags]
    environment = {
        **os.environ,
        "PREFIXD_ADMIN_KEY": ADMIN_KEY,
        "PREFIXD_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with output.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    server = LiveServer(f"http://127.0.0.1:{port}", process, output)
    try:
        wait_until_ready(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_until_ready(server: LiveServer) -> None:
    """Returns when /readyz says 200; raises with the server's output if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(httpx2.TransportError), server.client() as client:
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server did not get ready:\n{server.output.read_text()}")
