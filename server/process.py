"""The serving process: uvicorn around the app, signals, the drain, and the end when the engine can not go on.

Runs on the main thread, called by `server.cli`. Exit codes: 0 after a drain, 1 it never came up, 70 the engine died, 75 it
hangs; a second signal ends the process at once, by that signal.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Final, NoReturn, TypeAlias

import uvicorn

from server.bootstrap import Application
from server.connections import GuardedProtocol
from server.errors import GenerationFailed
from server.http.services import Lifecycle
from server.watchdog import EXIT_ENGINE_HANGS, Verdict, Watchdog

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS: Final = (
    75  # longer than a client's pool keeps its side open, or requests get lost
)
FAREWELL_SECONDS: Final = 3
"""After the drain, for the last words of streams that it cut."""
FLUSH_SECONDS: Final = 1.5
"""The same where the engine can not go on: with the watchdog's own delay, within 2 s."""

IDLE_SECONDS: Final = 60.0

OnStarted: TypeAlias = "Callable[[Application, uvicorn.Server, str], Coroutine[None, None, None]]"


def run(application: Application, listener: socket.socket, url: str, on_started: OnStarted) -> int:
    """Serves on `listener` until a signal; `on_started` runs beside it as soon as it answers. Returns the exit code."""
    server = _Server(application, url, on_started)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn drains, then raises the signal again for whoever was there before it.
        signal.signal(number, _already_handled)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _already_handled(_: int, __: FrameType | None) -> None:
    """The server has drained on this signal; there is nothing left to do."""


class _Server(uvicorn.Server):
    """uvicorn in one process, telling when it is up and, to the probes, when it goes down."""

    def __init__(self, application: Application, url: str, on_started: OnStarted) -> None:
        self._application = application
        self._url = url
        self._on_started = on_started
        self._drain_seconds = application.serving.config.drain_seconds
        self._tasks: list[asyncio.Task[None]] = []
        super().__init__(
            uvicorn.Config(
                application.app,
                http=GuardedProtocol,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(self._drain_seconds) + FAREWELL_SECONDS,
            )
        )

    @property
    def _lifecycle(self) -> Lifecycle:
        lifecycle: Lifecycle = self._application.app.state.lifecycle
        return lifecycle

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            serving = self._application.serving
            watchdog = Watchdog(
                serving.engine, self._lifecycle, serving.config.hang_seconds, self._give_up
            )
            self._tasks = [
                asyncio.create_task(watchdog.run()),
                asyncio.create_task(self._prove_while_idle()),
                asyncio.create_task(self._on_started(self._application, self, self._url)),
            ]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._lifecycle.draining = True
        ending = asyncio.create_task(self._end_streams())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            for task in self._tasks:
                task.cancel()

    async def _prove_while_idle(self) -> None:
        """What runs proves the engine by itself; while nothing does, we ask."""
        engine, life = self._application.serving.engine, self._application.life
        while True:
            await asyncio.sleep(IDLE_SECONDS)
            status = engine.status()
            if not status.alive or status.num_running or status.num_waiting:
                continue
            try:
                await life.prove()
            except GenerationFailed as failure:
                logger.critical("%s", failure)
                self._lifecycle.fault = str(failure)  # for good: it is for a supervisor to act
                return

    async def _end_streams(self) -> None:
        """uvicorn waits for open answers, then cuts them; those still open after the drain get a last word before."""
        await asyncio.sleep(self._drain_seconds)
        self._application.serving.engine.end_streams("the server is shutting down; try again")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._lifecycle.draining = True
        if self.should_exit:
            # Whoever asks a second time does not want to wait. The store expects no less of a crash.
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)

    async def _give_up(self, verdict: Verdict) -> NoReturn:
        """Lets the last words out and ends the process. No clean-up: it would wait for the engine thread."""
        if verdict.exit_code == EXIT_ENGINE_HANGS and sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__)  # where, not with what: no prompt is in it
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=FLUSH_SECONDS)
        await asyncio.sleep(0.1)  # what the answers wrote last is on its way out of the loop
        logging.shutdown()
        os._exit(verdict.exit_code)
