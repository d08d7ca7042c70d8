"""The open loop: each request leaves at its time, whatever became of those before it.

Runs on the event loop of `session`, one run at a time. Nothing here waits for an answer before the last request has left:
a generator that did would send less to a server that is slow, and never see what its users see.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from loadtest.generated_answer import GeneratedAnswer, request_body
from loadtest.recorder import Recorder
from loadtest.traffic import Shape, Traffic
from loadtest.wire import Connections, Origin

ROUTE: Final = "/generate"
_DRAIN_POLL_SECONDS: Final = 0.02
_HEAD_START_SECONDS: Final = (
    0.05  # the first request must not be late because of what is prepared before it
)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the requests go. `tasks[rank]` is the name that a request says; `max_open`: connections at most."""

    origin: Origin
    headers: dict[str, str]
    tasks: Sequence[str]
    vocab_size: int
    max_open: int


class OpenLoop:
    """One run. `record` can be watched while it goes on."""

    def __init__(
        self, traffic: Traffic, shape: Shape, destination: Destination, drain_seconds: float
    ) -> None:
        self.record = Recorder(traffic, shape.warmup_seconds, shape.total_seconds)
        self._traffic = traffic
        self._to = destination
        self._drain_seconds = drain_seconds
        self._start = 0.0
        self._over = False

    def now(self) -> float:
        """Seconds since the run's start."""
        return time.monotonic() - self._start

    async def run(self) -> None:
        """Sends everything, then waits for the answers, `drain_seconds` at most; what is open then is cut off."""
        connections = Connections(self._to.origin, self._to.max_open)
        self._start = time.monotonic() + _HEAD_START_SECONDS
        try:
            await self._send_all(connections)
            deadline = self.now() + self._drain_seconds
            while self.record.num_under_way and self.now() < deadline:  # noqa: ASYNC110 - one wait at the end; an event would be each answer's to keep
                await asyncio.sleep(_DRAIN_POLL_SECONDS)
        finally:
            self._over = True
            await connections.aclose()

    async def _send_all(self, connections: Connections) -> None:
        record, traffic = self.record, self._traffic
        for index, at in enumerate(traffic.at.tolist()):
            request = self._request(index)  # made before its time has come
            # Also when it is late already: the answers must be read meanwhile.
            await asyncio.sleep(max(at - self.now(), 0.0))
            record.sent(index, self.now())
            num_wanted = int(traffic.output_len[index])
            answer = GeneratedAnswer(index, num_wanted, record, self.now, lambda: self._over)
            connections.send(request, answer)

    def _request(self, index: int) -> bytes:
        traffic, to = self._traffic, self._to
        prompt = traffic.prompt(index, to.vocab_size)
        task = to.tasks[int(traffic.task[index])]
        body = request_body(task, prompt, int(traffic.output_len[index]))
        return to.origin.post(ROUTE, to.headers, body)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed, as in the server."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
