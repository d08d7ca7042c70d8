"""Real server processes that are asked to stop, that hang, whose engine dies: what their clients see, and how they end."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
from pathlib import Path

import pytest

from server.watchdog import EXIT_ENGINE_DIED, EXIT_ENGINE_HANGS
from tests.chaos.census import census, settled
from tests.chaos.leavers import leave_often
from tests.chaos.sick_server import DIES, HANGS
from tests.chaos.streams import body, read_all
from tests.e2e.live_server import LiveServer, live_server
from tests.tiny_model_dir import save_tiny_model

SICK = ("-m", "tests.chaos.sick_server")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staying-up")
    save_tiny_model(folder / "model")
    return folder


def flags(directory: Path, name: str) -> tuple[str, ...]:
    return ("--model", str(directory / "model"), "--store", str(directory / name))


def send(server: LiveServer, number: int) -> None:
    os.kill(server.process.pid, number)


@pytest.mark.parametrize(
    ("illness", "code", "reason", "patience"),
    [
        (DIES, EXIT_ENGINE_DIED, "the engine has failed", 0.0),
        (HANGS, EXIT_ENGINE_HANGS, "the engine hangs", 2.0),
    ],
    ids=["dies", "hangs"],
)
def test_when_the_engine_can_not_go_on_every_client_is_told_and_the_process_ends(
    directory: Path, illness: signal.Signals, code: int, reason: str, patience: float
) -> None:
    arguments = (*flags(directory, illness.name), "--hang-seconds", "2")
    requests = [body(480) for _ in range(4)] + [body(480, stream=False), body(400, n=4)]
    with live_server(directory, *arguments, program=SICK) as server:
        readings, fell_ill = asyncio.run(
            read_all(server.url, requests, lambda: send(server, illness))
        )
        assert server.process.wait(timeout=10) == code
        ended = time.monotonic()

    assert [r.broken for r in readings] == [""] * 6
    assert all(r.told and reason in r.error for r in readings)
    # Two seconds, on a machine that does nothing else.
    assert max(r.ended for r in readings) - fell_ill < patience + 4
    assert ended - fell_ill < patience + 6
    log = server.output.read_text()
    assert f"code {code}" in log
    assert "sick_server.py" in log, "it says where"


def test_sigterm_lets_streams_end_within_the_grace_and_tells_the_others(directory: Path) -> None:
    arguments = (*flags(directory, "drain"), "--drain-seconds", "2")
    requests = [body(40), body(40, n=3), body(60, stream=False), body(490)]
    with live_server(directory, *arguments, program=SICK) as server:
        readings, asked = asyncio.run(
            read_all(server.url, requests, lambda: send(server, signal.SIGTERM))
        )
        assert server.process.wait(timeout=15) == 0

    *fitting, long = readings
    assert all(r.whole for r in fitting)
    assert [r.num_tokens for r in fitting] == [40, 120, 60]
    assert long.told
    assert "shutting down" in long.error
    assert 1.5 < long.ended - asked < 10


def test_a_second_sigterm_ends_the_process_at_once(directory: Path) -> None:
    arguments = flags(directory, "twice")
    with live_server(directory, *arguments, program=SICK) as server:

        def twice() -> None:
            send(server, signal.SIGTERM)
            time.sleep(0.3)
            send(server, signal.SIGTERM)

        [reading], _ = asyncio.run(read_all(server.url, [body(490)], twice))
        assert server.process.wait(timeout=5) == -signal.SIGTERM

    assert reading.broken


def test_clients_that_leave_at_any_moment_leave_nothing_behind(directory: Path) -> None:
    with live_server(directory, *flags(directory, "leavers"), program=SICK) as server:
        port = int(server.url.rsplit(":", 1)[1])
        run = functools.partial(leave_often, port, ["model"], at_once=8)
        asyncio.run(run(count=8, seed=1))  # threads and caches that stay
        before = settled(server, census(server), 1.0)
        left = asyncio.run(run(count=80, seed=2))
        after = settled(server, before)

        assert sum(left.values()) == 80
        assert after.held == before.held
        assert (after.streams, after.request_blocks, after.running) == (0, 0, 0)
        readings, _ = asyncio.run(read_all(server.url, [body(5)], lambda: None))
        assert readings[0].whole
