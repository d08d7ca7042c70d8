"""What a server process holds: descriptors, threads, asyncio tasks, open streams, blocks of requests.

The tasks and streams are told by `tests.chaos.sick_server` itself, on SIGHUP, in its log.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.live_server import LiveServer


@dataclass(frozen=True)
class Census:
    """`rss_bytes` is for the report; the rest must come back to what it was."""

    descriptors: int
    tasks: int
    streams: int
    timers: int
    request_blocks: int
    running: int
    waiting: int
    rss_bytes: int

    @property
    def held(self) -> dict[str, int]:
        """All that a request that is gone must not hold."""
        return {name: n for name, n in vars(self).items() if name != "rss_bytes"}


def census(server: LiveServer) -> Census:
    """As of now; its own connection and the probe's task included, each time alike."""
    pid = server.process.pid
    told = server.output.read_text(errors="replace").count("census:")
    os.kill(pid, signal.SIGHUP)
    deadline = time.monotonic() + 30
    while (log := server.output.read_text(errors="replace")).count("census:") == told:
        assert time.monotonic() < deadline, "the server does not answer SIGHUP"
        time.sleep(0.02)
    own = json.loads(log.rsplit("census:", 1)[1].splitlines()[0])
    metrics = server.metrics()
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    statm = Path(f"/proc/{pid}/statm").read_text().split()
    return Census(
        descriptors=descriptors,
        tasks=own["tasks"],
        streams=own["streams"],
        timers=own["timers"],
        request_blocks=int(value(metrics, "prefixd_kv_cache_blocks", state="request")),
        running=int(value(metrics, "prefixd_requests_running")),
        waiting=int(value(metrics, "prefixd_requests_waiting", reason="capacity")),
        rss_bytes=int(statm[1]) * os.sysconf("SC_PAGE_SIZE"),
    )


def value(metrics: str, name: str, **labels: str) -> float:
    """One sample of a scrape."""
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    raise AssertionError(f"no sample {name} {labels}")


def settled(server: LiveServer, before: Census, seconds: float = 30.0) -> Census:
    """The census once nothing is held beyond `before`, or what is still held when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        now = census(server)
        if now.held == before.held or time.monotonic() > deadline:
            return now
        time.sleep(0.2)
