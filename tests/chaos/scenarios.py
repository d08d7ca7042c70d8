"""The large versions of what the tests do small: each returns the figures of its one line, and what was wrong.

Called by `python -m tests.chaos`. Every scenario starts its own servers, with the tiny model of the tests, in `directory`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx2

from server.watchdog import EXIT_ENGINE_DIED, EXIT_ENGINE_HANGS
from tests.chaos.census import census, settled
from tests.chaos.leavers import leave_often
from tests.chaos.sick_server import DIES, HANGS
from tests.chaos.slow_clients import slow_clients
from tests.chaos.streams import body, read_all
from tests.e2e.live_server import LiveServer, live_server

SICK: Final = ("-m", "tests.chaos.sick_server")


@dataclass
class Outcome:
    """`figures` are printed; each of `faults` is a sentence."""

    figures: dict[str, Any]
    faults: list[str] = field(default_factory=list)

    def expect(self, holds: bool, fault: str) -> None:
        """Notes a fault unless it holds."""
        if not holds:
            self.faults.append(fault)


def _server(directory: Path, *flags: str) -> Any:
    arguments = ("--model", str(directory / "model"), "--store", str(directory / "store"), *flags)
    return live_server(directory, *arguments, program=SICK)


def _kill(server: LiveServer, number: int) -> Callable[[], None]:
    return lambda: os.kill(server.process.pid, number)


def engine(directory: Path, scale: int) -> Outcome:
    """The engine dies `scale` times, and hangs a quarter as often, under 16 streams and 4 plain requests."""
    slowest, untold, codes, exits = 0.0, 0, 0, 0.0
    cases = [(DIES, EXIT_ENGINE_DIED, 0.0)] * scale
    cases += [(HANGS, EXIT_ENGINE_HANGS, 2.0)] * -(-scale // 4)
    for illness, code, patience in cases:
        requests = [body(480) for _ in range(16)] + [body(480, stream=False) for _ in range(4)]
        with _server(directory, "--hang-seconds", "2") as server:
            readings, fell_ill = asyncio.run(read_all(server.url, requests, _kill(server, illness)))
            codes += server.process.wait(timeout=30) != code
            exits = max(exits, time.monotonic() - fell_ill - patience)
        untold += sum(not reading.told for reading in readings)
        slowest = max(slowest, *(r.ended - fell_ill - patience for r in readings))
    outcome = Outcome(
        {
            "deaths": scale,
            "hangs": len(cases) - scale,
            "clients": 20 * len(cases),
            "untold": untold,
            "slowest_told_seconds": round(slowest, 2),
            "slowest_exit_seconds": round(exits, 2),
            "wrong_exit_codes": codes,
        }
    )
    outcome.expect(untold == 0, "a client was not told")
    outcome.expect(codes == 0, "an exit code was wrong")
    outcome.expect(slowest <= 2.0, "a client was told later than 2 s")
    return outcome


def drain(directory: Path, scale: int) -> Outcome:
    """`scale` SIGTERMs under 64 streams, all of which fit in the grace."""
    broken, codes, slowest = 0, 0, 0.0
    for _ in range(scale):
        requests = [body(100) for _ in range(64)]
        with _server(directory, "--drain-seconds", "60") as server:
            readings, asked = asyncio.run(
                read_all(server.url, requests, _kill(server, signal.SIGTERM))
            )
            codes += server.process.wait(timeout=60) != 0
            ended = time.monotonic()
        broken += sum(not (r.whole and r.num_tokens == 100) for r in readings)
        slowest = max(slowest, ended - max(asked, *(r.ended for r in readings)))
    outcome = Outcome(
        {
            "sigterms": scale,
            "streams": 64 * scale,
            "broken": broken,
            "wrong_exit_codes": codes,
            "slowest_exit_after_last_stream_seconds": round(slowest, 2),
        }
    )
    outcome.expect(broken == 0, "a stream that fits in the grace was broken")
    outcome.expect(codes == 0, "an exit code was not 0")
    return outcome


def leavers(directory: Path, scale: int) -> Outcome:
    """`scale` clients, 32 at a time, leave in random phases."""
    # A small pool: one that is written for the first time would look like a leak.
    with _server(directory, "--max-num-seqs", "32", "--num-kv-blocks", "1024") as server:
        port = int(server.url.rsplit(":", 1)[1])
        run = functools.partial(leave_often, port, ["model"], at_once=32)
        asyncio.run(run(count=200, seed=1))
        before = settled(server, census(server), 5.0)
        started = time.monotonic()
        halves = [asyncio.run(run(count=-(-scale // 2), seed=2))]
        amid = settled(server, before, 60.0)
        halves.append(asyncio.run(run(count=scale // 2, seed=3)))
        seconds = time.monotonic() - started
        after = settled(server, before, 60.0)
        readings, _ = asyncio.run(read_all(server.url, [body(20)], lambda: None))
    outcome = Outcome(
        {
            "disconnects": sum(sum(left.values()) for left in halves),
            "per_second": round(scale / seconds),
            "before": before.held,
            "after": after.held,
            "rss_mib": [count.rss_bytes >> 20 for count in (before, amid, after)],
        }
    )
    outcome.expect(after.held == before.held, "something is held that was not before")
    outcome.expect(readings[0].whole, "the server does not answer any more")
    return outcome


def slow(directory: Path, scale: int) -> Outcome:
    """`scale` clients that never read, and as many that send slowly, beside one that behaves."""
    with _server(directory, "--max-num-seqs", "32", "--max-num-queued", "4096") as server:
        alone = _first_token_seconds(server.url, 100)
        before = settled(server, census(server), 5.0)
        host = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        with (
            slow_clients(host, num_never_readers=scale, num_slow_senders=scale) as clients,
            ThreadPoolExecutor(1) as watching,
        ):
            waiting = watching.submit(clients.wait_until_cut, 90.0)
            time.sleep(3 + scale / 20)  # what they asked for is computed, and stuck
            beside = _first_token_seconds(server.url, 100)
            during = census(server)
            cut = waiting.result()
        after = settled(server, before, 60.0)
    p99_alone, p99_beside = _p99(alone), _p99(beside)
    outcome = Outcome(
        {
            "never_readers": scale,
            "slow_senders": scale,
            "p99_first_token_alone_seconds": round(p99_alone, 4),
            "p99_first_token_beside_seconds": round(p99_beside, 4),
            "still_open": cut.num_open,
            "slowest_sender_cut_seconds": round(cut.slowest_sender_seconds, 1),
            "slowest_reader_cut_seconds": round(cut.slowest_reader_seconds, 1),
            "kib_per_client": round((during.rss_bytes - before.rss_bytes) / 1024 / (2 * scale), 1),
            "before": before.held,
            "after": after.held,
        }
    )
    outcome.expect(cut.num_open == 0, "a client was never cut")
    outcome.expect(after.held == before.held, "something is held that was not before")
    return outcome


def _first_token_seconds(url: str, count: int) -> list[float]:
    """Of requests one after the other."""
    seconds = []
    with httpx2.Client(base_url=url, timeout=60.0) as client:
        for _ in range(count):
            started = time.monotonic()
            with client.stream("POST", "/v1/completions", json=body(2)) as answer:
                lines = answer.iter_lines()
                next(lines)
                seconds.append(time.monotonic() - started)
                deque(lines, maxlen=0)
    return seconds


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


SCENARIOS: Final[dict[str, tuple[Callable[[Path, int], Outcome], int]]] = {
    "engine": (engine, 20),
    "drain": (drain, 50),
    "leavers": (leavers, 10_000),
    "slow": (slow, 200),
}
"""Each with the scale that it is reported at."""
