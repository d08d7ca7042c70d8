"""The curves of a load test as PNG: latency distributions, throughput over time, figures by number of tasks.

Called by `report`, on the main thread. Matplotlib is imported when something is drawn, without pyplot and its global
state. One line for each number of tasks, in colours that differ for colour-blind eyes (Okabe and Ito's).
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loadtest.errors import PlotsUnavailable
from loadtest.recorder import Recorder
from loadtest.summary import throughput_ratios
from loadtest.tables import name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2328")
STYLES: Final = ("-", "--", ":")  # for more runs than colours
_INK, _FAINT = "#1f2328", "#d0d7de"
_WIDTH: Final = 7.2  # inches
_DPI: Final = 140
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
Draw = Callable[["Figure"], None]


def require_matplotlib() -> None:
    """Raises `PlotsUnavailable`: before a run of minutes, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotsUnavailable(
            "--out draws plots and needs matplotlib: pip install 'prefixd[bench]'"
        )


def draw_plots(measured: Measured) -> dict[str, bytes]:
    """PNG by name, of every plot that there is data for; names are those of `CAPTIONS`."""
    wanted: dict[str, tuple[bool, float, Draw]] = {
        "ttft": (_any(measured, "ttft"), 3.2, lambda figure: _ttft(measured, figure)),
        "itl": (_any(measured, "itl"), 3.2, lambda figure: _itl(measured, figure)),
        "throughput": (bool(measured), 3.0, lambda figure: _throughput(measured, figure)),
        "tasks": (len(measured) > 1, 3.0, lambda figure: _by_tasks(measured, figure)),
    }
    return {name: _png(draw, height) for name, (there, height, draw) in wanted.items() if there}


def _any(measured: Measured, key: str) -> bool:
    return any(run[key]["count"] for run, _ in measured)


def _ttft(measured: Measured, figure: Figure) -> None:
    axes = _titled(figure.subplots(), "Time to first token", "seconds", "share of the requests")
    for number, (run, record) in enumerate(measured):
        counted = record.traffic.at >= record.warmup_seconds
        values = np.sort((record.first_token - record.traffic.at)[counted])
        values = values[~np.isnan(values)]  # those without a first token keep the curve below 1
        shares = np.arange(1, len(values) + 1) / max(int(counted.sum()), 1)
        _step(axes, values, shares, number, name_of(run))
    _finish_distribution(axes)


def _itl(measured: Measured, figure: Figure) -> None:
    axes = _titled(figure.subplots(), "Gap between tokens", "seconds", "share of the gaps")
    for number, (run, record) in enumerate(measured):
        seconds, shares = record.gaps.curve()
        _step(axes, np.array(seconds), np.array(shares), number, name_of(run))
    _finish_distribution(axes)


def _step(axes: Axes, x: Any, y: Any, number: int, label: str) -> None:
    if not len(x):
        return
    every = max(len(x) // _MAX_POINTS, 1)
    x, y = np.append(x[::every], x[-1]), np.append(y[::every], y[-1])
    axes.step(x, y, where="post", label=label, **_look(number))


def _finish_distribution(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.04)
    axes.set_ylim(0, 1.03)
    _legend(axes)


def _throughput(measured: Measured, figure: Figure) -> None:
    axes = figure.subplots()
    longest = max(len(record) for _, record in _seconds(measured))
    width = max(math.ceil(longest / _MAX_BINS), 1)
    means = "second" if width == 1 else f"{width} seconds"
    _titled(axes, "Throughput over time", f"seconds; means over each {means}", "output tokens/s")
    for number, (label, counts) in enumerate(_seconds(measured)):
        whole = counts[: len(counts) // width * width].reshape(-1, width).mean(axis=1)
        axes.plot((np.arange(len(whole)) + 0.5) * width, whole, label=label, **_look(number))
    warmup = measured[0][1].warmup_seconds
    if warmup:
        axes.axvspan(0, warmup, color=_FAINT, alpha=0.45, linewidth=0)
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


def _by_tasks(measured: Measured, figure: Figure) -> None:
    runs = [run for run, _ in measured]
    places, names = range(len(runs)), [name_of(run) for run in runs]
    left, right = figure.subplots(1, 2)
    ratios = [ratio or 0.0 for ratio in throughput_ratios(runs).values()]
    _titled(left, "Throughput ratio", "tasks", "output tok/s, relative")
    left.bar(places, ratios, width=0.6, color=LINES[0])
    for place, ratio in zip(places, ratios, strict=True):
        left.annotate(f"{ratio:.2f}", (place, ratio), ha="center", va="bottom", fontsize=8)
    left.set_ylim(0, max(ratios, default=0.0) * 1.15 or 1.0)
    _titled(right, "Time to first token", "tasks", "seconds")
    for number, percent in enumerate(("p50", "p99")):
        values = [run["ttft"][percent] for run in runs]
        known = [np.nan if value is None else value for value in values]
        right.plot(places, known, marker="o", ms=4, label=percent, **_look(number))
    right.set_ylim(bottom=0)
    _legend(right, "")
    for axes in (left, right):
        axes.set_xticks(list(places), names)


# ---- looks -----------------------------------------------------------------------------------------


def _png(draw: Draw, height: float) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_settings()):
        figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})  # same run, same bytes
    return data.getvalue()


def _look(number: int) -> dict[str, Any]:
    return {
        "color": LINES[number % len(LINES)],
        "linestyle": STYLES[number // len(LINES) % len(STYLES)],
    }


def _titled(axes: Axes, title: str, x: str, y: str) -> Axes:
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _legend(axes: Axes, title: str = "tasks") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title=title or None, loc="best", framealpha=0.85, edgecolor=_FAINT)


def _settings() -> Any:  # dict; matplotlib spells out each of its 300 keys as a type
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.edgecolor": _INK,
        "grid.color": _FAINT,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.6,
        "legend.fontsize": 8,
        "legend.title_fontsize": 8,
    }
