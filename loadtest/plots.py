"""The curves of a load test as PNG: latency distributions, throughput over time, figures by number of tasks.

Called by `report`, on the main thread. One line for each number of tasks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loadtest.recorder import Recorder
from loadtest.summary import throughput_ratios
from loadtest.tables import name_of
from reports.plot_style import Theme, png, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: Final = ("-", "--", ":")  # for more runs than colours
_MAX_POINTS: Final = 2_000
_MAX_BINS: Final = 30  # of the throughput; more would be noise

CAPTIONS: Final = {
    "ttft": "Time to first token from the scheduled arrival: share of the requests that had it by then",
    "itl": "Gap between two events with tokens: share of the gaps up to that length",
    "throughput": "Output tokens that arrived, by time; the warm-up, which does not count, is shaded",
    "tasks": "Throughput over that of the run it is compared with, and TTFT, by number of tasks",
}
"""What each plot shows, in the order in which the report shows them."""

Measured = Sequence[tuple[dict[str, Any], Recorder]]


def draw_plots(measured: Measured, theme: Theme) -> dict[str, bytes]:
    """PNG by name, of every plot that there is data for; names are those of `CAPTIONS`. Raises `PlotsUnavailable`."""
    wanted: dict[str, tuple[bool, float, Callable[[Measured, Figure, Theme], None]]] = {
        "ttft": (_any(measured, "ttft"), 3.2, _ttft),
        "itl": (_any(measured, "itl"), 3.2, _itl),
        "throughput": (bool(measured), 3.0, _throughput),
        "tasks": (len(measured) > 1, 3.0, _by_tasks),
    }
    return {
        name: png(functools.partial(draw, measured), height, theme)
        for name, (there, height, draw) in wanted.items()
        if there
    }


def _any(measured: Measured, key: str) -> bool:
    return any(run[key]["count"] for run, _ in measured)


def _ttft(measured: Measured, figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    titled(axes, "Time to first token", "seconds", "share of the requests")
    for number, (run, record) in enumerate(measured):
        counted = record.traffic.at >= record.warmup_seconds
        values = np.sort((record.first_token - record.traffic.at)[counted])
        values = values[~np.isnan(values)]  # those without a first token keep the curve below 1
        shares = np.arange(1, len(values) + 1) / max(int(counted.sum()), 1)
        _step(axes, values, shares, name_of(run), _look(number, theme))
    _finish_distribution(axes)


def _itl(measured: Measured, figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    titled(axes, "Gap between tokens", "seconds", "share of the gaps")
    for number, (run, record) in enumerate(measured):
        seconds, shares = record.gaps.curve()
        _step(axes, np.array(seconds), np.array(shares), name_of(run), _look(number, theme))
    _finish_distribution(axes)


def _step(axes: Axes, x: Any, y: Any, label: str, look: dict[str, Any]) -> None:
    if not len(x):
        return
    every = max(len(x) // _MAX_POINTS, 1)
    x, y = np.append(x[::every], x[-1]), np.append(y[::every], y[-1])
    axes.step(x, y, where="post", label=label, **look)


def _finish_distribution(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.04)
    axes.set_ylim(0, 1.03)
    _legend(axes)


def _throughput(measured: Measured, figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    longest = max(len(record) for _, record in _seconds(measured))
    width = max(math.ceil(longest / _MAX_BINS), 1)
    means = "second" if width == 1 else f"{width} seconds"
    titled(axes, "Throughput over time", f"seconds; means over each {means}", "output tokens/s")
    for number, (label, counts) in enumerate(_seconds(measured)):
        whole = counts[: len(counts) // width * width].reshape(-1, width).mean(axis=1)
        axes.plot((np.arange(len(whole)) + 0.5) * width, whole, label=label, **_look(number, theme))
    warmup = measured[0][1].warmup_seconds
    if warmup:
        axes.axvspan(0, warmup, color=theme.faint, alpha=0.45, linewidth=0)
    axes.set_xlim(0, longest)
    axes.set_ylim(bottom=0)
    _legend(axes)


def _seconds(measured: Measured) -> list[tuple[str, Any]]:
    """Each run's tokens in each whole second in which requests were sent."""
    found = []
    for run, record in measured:
        end = max(int(record.warmup_seconds + record.window_seconds), 1)
        found.append((name_of(run), record.tokens_per_bin[:end]))
    return found


def _by_tasks(measured: Measured, figure: Figure, theme: Theme) -> None:
    runs = [run for run, _ in measured]
    places, names = range(len(runs)), [name_of(run) for run in runs]
    left, right = figure.subplots(1, 2)
    ratios = [ratio or 0.0 for ratio in throughput_ratios(runs).values()]
    titled(left, "Throughput ratio", "tasks", "output tok/s, relative")
    left.bar(places, ratios, width=0.6, color=theme.lines[0])
    for place, ratio in zip(places, ratios, strict=True):
        left.annotate(f"{ratio:.2f}", (place, ratio), ha="center", va="bottom", fontsize=8)
    left.set_ylim(0, max(ratios, default=0.0) * 1.15 or 1.0)
    titled(right, "Time to first token", "tasks", "seconds")
    for number, percent in enumerate(("p50", "p99")):
        values = [run["ttft"][percent] for run in runs]
        known = [np.nan if value is None else value for value in values]
        right.plot(places, known, marker="o", ms=4, label=percent, **_look(number, theme))
    right.set_ylim(bottom=0)
    _legend(right, "")
    for axes in (left, right):
        axes.set_xticks(list(places), names)


def _look(number: int, theme: Theme) -> dict[str, Any]:
    return {
        "color": theme.lines[number % len(theme.lines)],
        "linestyle": STYLES[number // len(theme.lines) % len(STYLES)],
    }


def _legend(axes: Axes, title: str = "tasks") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title=title or None, loc="best", fontsize=8, title_fontsize=8)
