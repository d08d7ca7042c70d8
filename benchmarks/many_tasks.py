"""What it costs that requests are of different tasks: 32 tasks of 1,000 in one batch, against one task.

**What is measured.** One engine, 1,000 published prefixes of 32 tokens. 32 requests arrive together, three ways:

* `many_tasks`: each of another task, the prefixes resident, as they are while the tasks are in use;
* `one_task`: all of the same task;
* `many_tasks_cold`: as the first, but every prefix is on disk only and is read, verified and loaded meanwhile.

**Why it should cost nothing.** A step computes the same linear layers whatever the rows attend over. On a CPU a row
attends over its own block table, so 32 prefixes are read as often as one prefix 32 times; that one stays
in a processor's cache and 32 may not is all the difference, and small against the weights: 0.4 MB a prefix, 1 GB of
weights. What is published but not asked for is a dictionary entry.

**How to read it.** `vs_one_task` is the first line's tokens per second over the second's; 0.97 or more is the goal.
`limit` counts each task's prefix once per step.

**Unfair to nobody:** there is no peer. Prefixes and weights are random, which changes no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.command_line import (
    DTYPES,
    Progress,
    contest_parser,
    limits_meter,
    parse,
    publish,
    rules,
)
from benchmarks.contest import Call, compete
from benchmarks.hardware_limits import ModelCost, kv_bytes_per_token
from benchmarks.prefixd_contestant import Prefixd
from benchmarks.report import Machine, Report
from benchmarks.transformers_contestants import load_plain_model
from benchmarks.workload import SCALES, Request, random_prefixes, write_model


class Spread:
    """The requests over these tasks in turn, through an engine that others use too."""

    def __init__(self, engine: Prefixd, name: str, tasks: Sequence[str], *, cold: bool) -> None:
        self.name: Final = name
        self.description: Final = (
            f"requests over {len(tasks)} tasks, prefixes {'from disk' if cold else 'resident'}"
        )
        self._engine = engine
        self._tasks = tasks
        self._cold = cold

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """One call."""
        tasks = self._tasks
        return [tuple(replace(r, task=tasks[r.index % len(tasks)]) for r in requests)]

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        self._engine.cold = self._cold
        return self._engine.serve(requests, output_len)

    def close(self) -> None:
        """Who made the engine closes it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints it; the last line is JSON."""
    parser = contest_parser("many_tasks", "32 tasks of many in one batch, against one task")
    parser.add_argument("--registered", type=int, default=1000, help="published tasks")
    arguments = parse(parser, argv)
    report = run(arguments)
    publish(arguments.out, report.markdown(), report.text(), report.figures())


def run(arguments: argparse.Namespace) -> Report:
    """Publishes all prefixes, then lets the three ways take turns."""
    scale, dtype = SCALES[arguments.scale], DTYPES[arguments.dtype]
    number = min(scale.workload.num_requests, arguments.registered)
    work = replace(scale.workload, num_tasks=number, requests_per_task=1)
    progress, machine = Progress(), Machine.describe(("torch", "transformers"))
    meter = limits_meter(scale, dtype)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="prefixd-bench-")))
        write_model(directory / "model", scale, dtype)
        plain = load_plain_model(directory / "model")
        cost = ModelCost.of(plain, kv_bytes_per_token(plain))
        del plain
        names = [f"task-{i}" for i in range(arguments.registered)]
        engine = Prefixd(
            directory / "model",
            directory / "store",
            random_prefixes(scale, dtype, names),
            kv_cache_bytes=scale.kv_cache_bytes,
        )
        stack.callback(engine.close)
        progress(f"{len(names)} prefixes published")
        asked = names[:: len(names) // number][:number]
        contestants = [
            Spread(engine, "many_tasks", asked, cold=False),
            Spread(engine, "one_task", asked[:1], cold=False),
            Spread(engine, "many_tasks_cold", asked, cold=True),
        ]
        requests = work.requests(scale.config["vocab_size"])
        results = compete(contestants, requests, rules(arguments, work), progress, meter.measure)
    return Report(
        title=f"prefixd: {number} tasks of {arguments.registered} against one, on a CPU",
        benchmark="many_tasks",
        command=arguments.command,
        model=f"{scale.name}, {arguments.dtype}",
        machine=machine,
        workload=work,
        cost=cost,
        limits=meter.limits(),
        results=results,
    )


if __name__ == "__main__":
    main()
