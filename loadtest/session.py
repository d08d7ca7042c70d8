"""The composition root of a load test: looks at the server, makes tasks if it shall, runs once for each number of tasks.

Main thread; each run has an event loop on it. Called by `cli_bench`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.descriptors import max_open_streams
from loadtest.made_tasks import MadeTasks, made_tasks
from loadtest.open_loop import Destination, OpenLoop, loop_factory
from loadtest.progress import REFRESH_SECONDS, Progress, line
from loadtest.recorder import Recorder
from loadtest.server_view import Served, ServerView, difference
from loadtest.settings import Plan, check_made, check_shape, make_plan
from loadtest.summary import summarise
from loadtest.traffic import Shape, make_traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest:
    """What was asked for. `num_tasks` empty: one run over all tasks. `make_tasks` 0: those that the server has."""

    shape: Shape
    num_tasks: tuple[int, ...] = ()
    make_tasks: int = 0
    num_virtual_tokens: int = 32
    name_prefix: str = "bench"
    keep_tasks: bool = False
    drain_seconds: float = 60.0
    max_open: int | None = None
    slo_ttft: float | None = None


@dataclass(slots=True)
class Results:
    """What has been measured so far: kept by the caller, so that an interrupt loses no run that was whole."""

    served: Served | None = None
    plan: Plan | None = None
    runs: list[tuple[dict[str, Any], Recorder]] = field(default_factory=list)


def run_load_test(test: LoadTest, server: ServerView, results: Results, progress: Progress) -> None:
    """Adds each run to `results` as it ends. Raises `LoadTestError`."""
    check_shape(test.shape)
    max_open = max_open_streams(test.max_open)
    served = results.served = server.look()
    with _tasks(test, server, progress) as made:
        if made:
            served = server.look()
        plan = results.plan = make_plan(test.shape, test.num_tasks, served, made)
        for num_tasks in plan.num_tasks:
            to = Destination(
                server.origin,
                server.infer_headers,
                plan.names(num_tasks),
                plan.vocab_size,
                max_open,
            )
            loop = OpenLoop(make_traffic(plan.shape, num_tasks), plan.shape, to, test.drain_seconds)
            counted = _in_loop(loop, server, progress, _title(num_tasks))
            summary = summarise(loop.record, num_tasks, test.slo_ttft)
            results.runs.append(({**summary, "server_counters": counted}, loop.record))


def _tasks(
    test: LoadTest, server: ServerView, progress: Progress
) -> contextlib.AbstractContextManager[Sequence[str]]:
    if not test.make_tasks:
        return contextlib.nullcontext(())
    check_made(test.make_tasks, test.name_prefix)
    tasks = MadeTasks(server, test.name_prefix, progress.count)
    return made_tasks(
        tasks, test.make_tasks, test.num_virtual_tokens, test.shape.seed, keep=test.keep_tasks
    )


def _title(num_tasks: int) -> str:
    if not num_tasks:
        return "bare base"
    return f"{num_tasks} task{'' if num_tasks == 1 else 's'}"


def _in_loop(
    loop: OpenLoop, server: ServerView, progress: Progress, title: str
) -> dict[str, float] | None:
    """Runs it; how far the server's counters went from the end of the warm-up to the last answer."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_watched(loop, server, progress, title))


async def _watched(
    loop: OpenLoop, server: ServerView, progress: Progress, title: str
) -> dict[str, float] | None:
    async def show() -> None:
        while True:
            progress.show(line(title, loop.record, loop.now()))
            await asyncio.sleep(REFRESH_SECONDS)

    async def scrape() -> str | None:
        await asyncio.sleep(loop.record.warmup_seconds)
        return await asyncio.to_thread(server.metrics_text)

    showing, before = asyncio.create_task(show()), asyncio.create_task(scrape())
    try:
        await loop.run()
        progress.show(line(title, loop.record, loop.now()), now=True)
        return difference(await before, await asyncio.to_thread(server.metrics_text))
    finally:
        showing.cancel()
        before.cancel()
