"""What others may know of the engine: its figures as they come, and how it is. Made by `AsyncEngine` on the event loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from server.types import RequestStats, StepStats


class EngineObserver(Protocol):
    """Who wants the engine's figures: `server.metrics.Metrics`. Called on the event loop."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_request(self, stats: RequestStats) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Whether the engine thread lives, and how long ago it last came round its loop."""

    alive: bool
    heartbeat_age_seconds: float
    num_running: int
    num_waiting: int
