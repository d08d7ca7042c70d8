"""`bench`: load a running server as its users would, and say what it did. A command of `python -m loadtest`, main thread.

Progress goes to standard error, the tables to standard output, whose last line is one JSON object with all figures.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Group, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest.errors import BadLoad, LoadTestError
from loadtest.progress import Progress
from loadtest.report import all_warnings, write_json, write_report
from loadtest.server_view import ServerView
from loadtest.session import LoadTest, Results, run_load_test
from loadtest.settings import Lengths
from loadtest.tables import tables
from loadtest.traffic import Shape
from loadtest.wire import Origin
from reports.plot_style import PlotsUnavailable, require_matplotlib
from server.cli_client import DEFAULT_URL, AdminKey
from server.config import environment

INTERRUPTED: Final = 130
_WIDE: Final = 120  # columns of a table that goes to a file

_TRAFFIC: Final = Group.create_ordered("Traffic")
_TASKS: Final = Group.create_ordered("Tasks")
_SERVER: Final = Group.create_ordered("Server")
_RESULTS: Final = Group.create_ordered("Results")


def bench(
    url: Annotated[
        str | None,
        Parameter(group=_SERVER, help=f"The server; PREFIXD_URL, or {DEFAULT_URL}, if left out"),
    ] = None,
    /,
    *,
    rate: Annotated[float, Parameter(group=_TRAFFIC, help="Arrivals per second")] = 10.0,
    duration: Annotated[
        float, Parameter(group=_TRAFFIC, help="Seconds that count, for each number of tasks")
    ] = 60.0,
    warmup: Annotated[
        float, Parameter(group=_TRAFFIC, help="Seconds of the same traffic before, not counted")
    ] = 10.0,
    burstiness: Annotated[
        float,
        Parameter(group=_TRAFFIC, help="Coefficient of variation of the gaps; 1 is Poisson"),
    ] = 1.0,
    input_len: Annotated[
        Lengths,
        Parameter(group=_TRAFFIC, negative=(), help="Tokens of a prompt, uniform from .. to"),
    ] = (8, 512),
    output_len: Annotated[
        Lengths,
        Parameter(group=_TRAFFIC, negative=(), help="Tokens of an answer, uniform from .. to"),
    ] = (8, 512),
    seed: Annotated[int, Parameter(group=_TRAFFIC, help="The same seed, the same traffic")] = 0,
    drain: Annotated[
        float, Parameter(group=_TRAFFIC, help="Seconds to wait for answers after the last arrival")
    ] = 60.0,
    tasks: Annotated[
        tuple[int, ...],
        Parameter(
            group=_TASKS,
            consume_multiple=True,
            negative=(),
            show_default=False,
            help="One run for each number, as 1 5 100 1000; 0 is the bare base; all tasks if left out",
        ),
    ] = (),
    zipf: Annotated[
        float,
        Parameter(
            group=_TASKS, help="Popularity of the r-th task is 1 / r ** this; 0 makes all equal"
        ),
    ] = 1.0,
    make_tasks: Annotated[
        int,
        Parameter(
            group=_TASKS,
            show_default=False,
            help="Make so many tasks of random prefixes, use them alone, and remove them afterwards",
        ),
    ] = 0,
    num_virtual_tokens: Annotated[
        int, Parameter(group=_TASKS, help="Length of the prefixes that are made")
    ] = 32,
    name_prefix: Annotated[
        str, Parameter(group=_TASKS, help="Their names begin so: bench-0001")
    ] = "bench",
    keep_tasks: Annotated[
        bool, Parameter(group=_TASKS, negative=(), show_default=False, help="Leave them there")
    ] = False,
    api_key: Annotated[
        str | None, Parameter(group=_SERVER, help="Its API key; PREFIXD_API_KEY if left out")
    ] = None,
    admin_key: Annotated[AdminKey, Parameter(group=_SERVER)] = None,
    max_open: Annotated[
        int | None,
        Parameter(group=_SERVER, help="Streams open at once; as many as descriptors allow"),
    ] = None,
    slo_ttft: Annotated[
        float | None,
        Parameter(group=_RESULTS, help="Seconds; reports the share of requests whose TTFT kept it"),
    ] = None,
    json_file: Annotated[
        Path | None, Parameter(name="--json", group=_RESULTS, help="Write all figures to this file")
    ] = None,
    out: Annotated[
        Path | None,
        Parameter(group=_RESULTS, help="Write report.html, plots and figures to this folder"),
    ] = None,
) -> int:
    """Load a running server as many users would, and measure what they would see.

    An open loop: each request leaves at the time that was drawn for it, whatever became of those before, and its
    latency counts from that time. Above the server's capacity the queue grows until the end; that is what it shows.
    """
    if out is not None:
        _require_plots()
    shape = Shape(rate, burstiness, zipf, input_len, output_len, warmup, duration, seed)
    test = LoadTest(
        shape=shape,
        num_tasks=tasks,
        make_tasks=make_tasks,
        num_virtual_tokens=num_virtual_tokens,
        name_prefix=name_prefix,
        keep_tasks=keep_tasks,
        drain_seconds=drain,
        max_open=max_open,
        slo_ttft=slo_ttft,
    )
    origin = Origin.of(url or environment("URL") or DEFAULT_URL)
    keys = (api_key or environment("API_KEY"), admin_key or environment("ADMIN_KEY"))
    results = Results()
    interrupted, failure = _run(test, ServerView(origin, *keys), results)
    figures = _figures(test, origin, results, interrupted)
    if results.runs:
        _print(figures)
        if json_file is not None:
            write_json(json_file, figures)
        if out is not None:
            write_report(out, results.runs, figures)
    if results.runs or failure is None:
        print(json.dumps(figures), flush=True)
    if failure is not None:
        raise failure
    return INTERRUPTED if interrupted else 0


def _require_plots() -> None:
    """Before a run of minutes, not after it."""
    try:
        require_matplotlib()
    except PlotsUnavailable as reason:
        raise BadLoad(f"--out: {reason}") from None


def _run(test: LoadTest, server: ServerView, results: Results) -> tuple[bool, LoadTestError | None]:
    """Whether someone interrupted it, and what made it fail: neither takes away the runs that were whole.

    The tasks that it made are gone by then, unless the failure says otherwise.
    """
    try:
        with server, Progress() as progress:
            run_load_test(test, server, results, progress)
    except KeyboardInterrupt:
        return True, None
    except LoadTestError as error:
        return False, error
    return False, None


def _figures(test: LoadTest, origin: Origin, results: Results, interrupted: bool) -> dict[str, Any]:
    served, plan = results.served, results.plan
    settings = asdict(test)
    settings["shape"] = asdict(test.shape if plan is None else plan.shape)
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "server": {
            "url": origin.url,
            "model": served.base.name if served else None,
            "version": served.version if served else None,
        },
        "settings": {**settings.pop("shape"), **settings},
        "notes": list(plan.notes) if plan else [],
        "interrupted": interrupted,
        "runs": [run for run, _ in results.runs],
    }


def _print(figures: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    for content in tables(figures["runs"]):
        table = Table(title=content.title, title_justify="left", title_style="bold")
        for name, is_number in zip(content.header, content.is_number, strict=True):
            table.add_column(name, justify="right" if is_number else "left")
        for row in content.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        if content.note:
            console.print(Text(content.note, style="dim"))
        console.print()
    for text in all_warnings(figures):
        console.print(Text(f"note: {text}", style="yellow"))
