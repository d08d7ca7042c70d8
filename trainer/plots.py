"""Curves of a training run as PNG, drawn from its records. Extra `[train]`.

Called at the end of a run (`conclusion`) and by `report`. Pure, on any thread; matplotlib is imported when something
is drawn. A curve without data is left out rather than drawn empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from reports.plot_style import LIGHT, Theme, legend, png, titled
from trainer.history import History, Points, per_layer, points, smoothed
from trainer.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLIP_FIELD: Final = "clip_norm"
_SMOOTH_FRACTION: Final = 0.04  # of the run: enough to see a trend, too little to hide a spike
_LOG_SPAN: Final = (
    20  # losses that fall further than this are a flat line at the end on a linear scale
)
_MAX_TICKS: Final = 12
_STEP: Final = "step"

CAPTIONS: Final = {
    "loss": "Loss on the training batches and on the held-out data",
    "metrics": "Generated metrics on the held-out data",
    "rate": "Learning rate, and gradient norm before clipping",
    "attention": "Attention of the completion tokens on the prefix, and on its first row",
    "norms": "Norms of the prefix's keys and values beside those of ordinary tokens",
}
"""What each plot shows, in the order in which a report shows them."""


def draw_plots(
    records: Iterable[Record], config: Mapping[str, Any], theme: Theme = LIGHT
) -> dict[str, bytes]:
    """PNG by name, of every plot that the records have data for. Names are those of `CAPTIONS`.

    Raises `PlotsUnavailable`.
    """
    history = History.of(records)
    clip = config.get(CLIP_FIELD)
    wanted = {
        "loss": (bool(history.steps), 3.2, partial(_loss, history)),
        "metrics": (bool(history.metrics()), 2.8, partial(_metrics, history)),
        "rate": (bool(history.steps), 4.2, partial(_rate, history, clip)),
        "attention": (bool(_grid(history.prefix, "attention_mass")), 4.6, partial(_mass, history)),
        "norms": (bool(_grid(history.prefix, "key_norms")), 5.4, partial(_norms, history)),
    }
    return {
        name: png(draw, height, theme) for name, (there, height, draw) in wanted.items() if there
    }


# ---- over the steps --------------------------------------------------------------------------------


def _loss(history: History, figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    titled(axes, "Loss", _STEP, "nats a completion token")
    steps, values = _xy(history.train_loss())
    window = max(round(len(values) * _SMOOTH_FRACTION), 1)
    train, held = theme.lines[:2]
    if window > 1:
        axes.plot(steps, values, color=train, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smoothed(values, window), color=train, label="training")
    if history.held_out:
        axes.plot(*_xy(history.held_out_loss()), color=held, marker="o", ms=3.5, label="held out")
    best = history.best()
    if best is not None:
        axes.plot(*best, color=held, marker="*", ms=13, linestyle="", label=f"best: {best[1]:.3f}")
    everything = (*values, *(loss for _, loss in history.held_out_loss()))
    finite = [value for value in everything if math.isfinite(value) and value > 0]
    if finite and max(finite) > _LOG_SPAN * min(finite):
        log_scale(axes, min(finite), max(finite))
        axes.set_ylabel("nats a completion token (log)")
    legend(axes)


def _metrics(history: History, figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    titled(axes, "Generated metrics", _STEP, "held out, %")
    for index, (name, values) in enumerate(history.metrics().items()):
        color = theme.lines[index % len(theme.lines)]
        axes.plot(*_xy(values), color=color, marker="o", ms=3.5, label=name.replace("_", " "))
    axes.set_ylim(bottom=0)
    legend(axes)


def _rate(history: History, clip: float | None, figure: Figure, theme: Theme) -> None:
    upper, lower = figure.subplots(2, sharex=True)
    titled(upper, "Learning rate", "", "learning rate")
    upper.plot(*_xy(points(history.steps, "learning_rate")), color=theme.lines[0])
    upper.set_ylim(bottom=0)
    titled(lower, "Gradient norm before clipping", _STEP, "L2 norm (log)")
    steps, values = _xy(points(history.steps, "grad_norm"))
    lower.plot(steps, values, color=theme.lines[1], linewidth=0.9)
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive:
        log_scale(lower, min(positive), max(*positive, clip or 0.0))
    if clip:
        lower.axhline(
            clip, color=theme.ink, linestyle="--", linewidth=1, label=f"clipped at {clip:g}"
        )
        legend(lower)


# ---- over the layers -------------------------------------------------------------------------------


def _mass(history: History, figure: Figure, theme: Theme) -> None:
    masses = {
        "Attention on the whole prefix": _grid(history.prefix, "attention_mass"),
        "Attention on its first row": _grid(history.prefix, "sink_mass"),
    }
    from matplotlib.colors import PowerNorm

    shown = {title: grid for title, grid in masses.items() if grid}
    rows = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    labels = [str(record["step"]) for record in history.prefix]
    for axes, (title, grid) in zip(rows, shown.items(), strict=True):
        titled(axes, title, _STEP if axes is rows[-1] else "", "layer")
        image = axes.imshow(
            [list(row) for row in zip(*grid, strict=True)],  # [layers, records]
            aspect="auto", origin="lower", cmap=theme.ramp, interpolation="nearest",
            norm=PowerNorm(0.5, vmin=0.0, vmax=1.0),  # a tenth and a hundredth can be told apart
        )  # fmt: skip
        axes.grid(visible=False)
        _few_ticks(axes, labels)
        figure.colorbar(image, ax=axes, label="mean probability", pad=0.01)


def _norms(history: History, figure: Figure, theme: Theme) -> None:
    first, last = history.prefix[0], history.prefix[-1]
    parts = (("Keys", "key_norms"), ("Values", "value_norms"))
    for row, (title, field) in zip(figure.subplots(2, 2), parts, strict=True):
        _beside_natural(row[0], title, field, (first, last), theme)
        _ratios(row[1], title, field, history.prefix, theme)


def _beside_natural(
    axes: Axes, title: str, field: str, records: tuple[Record, Record], theme: Theme
) -> None:
    """Norm by layer, of ordinary tokens, of the prefix at first, and of the prefix at last."""
    titled(axes, title, "layer", "mean L2 norm")
    first, last = records
    lines = (
        (per_layer(last, f"natural_{field}"), "ordinary tokens", theme.ink, "--", None),
        (per_layer(first, field), f"step {first['step']}", theme.lines[4], "-", "s"),
        (per_layer(last, field), f"step {last['step']}", theme.lines[0], "-", "o"),
    )
    for values, label, color, style, marker in lines:
        if values:
            axes.plot(values, label=label, color=color, linestyle=style, marker=marker, ms=3.5)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=8)
    _whole_numbers(axes)


def _ratios(axes: Axes, title: str, field: str, records: Sequence[Record], theme: Theme) -> None:
    """Norm over that of ordinary tokens, by step: the band of all layers, and their median."""
    titled(axes, f"{title}: times ordinary tokens'", _STEP, "ratio of norms (log)")
    grid = [
        [own / natural for own, natural in _pairs(record, field) if natural > 0 and own > 0]
        for record in records
    ]
    steps = [record["step"] for record, row in zip(records, grid, strict=True) if row]
    rows = [sorted(row) for row in grid if row]
    if not rows:
        return
    axes.fill_between(
        steps, [row[0] for row in rows], [row[-1] for row in rows],
        color=theme.lines[0], alpha=0.2, linewidth=0, label="all layers",
    )  # fmt: skip
    axes.plot(
        steps, [row[len(row) // 2] for row in rows], color=theme.lines[0], label="median layer"
    )
    axes.axhline(1.0, color=theme.ink, linestyle="--", linewidth=1)
    log_scale(axes, min(0.8, *(row[0] for row in rows)), max(1.25, *(row[-1] for row in rows)))
    axes.legend(loc="best", fontsize=8)


def _pairs(record: Record, field: str) -> list[tuple[float, float]]:
    return list(zip(per_layer(record, field), per_layer(record, f"natural_{field}"), strict=False))


# ---- shapes and ticks ------------------------------------------------------------------------------


def _xy(values: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in values], [value for _, value in values]


def _grid(records: Sequence[Record], field: str) -> list[tuple[float, ...]]:
    """[records][layers]; empty where a record lacks the field."""
    rows = [per_layer(record, field) for record in records]
    return rows if rows and all(rows) else []


def _few_ticks(axes: Axes, labels: Sequence[str]) -> None:
    every = math.ceil(len(labels) / _MAX_TICKS)
    axes.set_xticks(range(0, len(labels), every), labels[::every])
    _whole_numbers(axes, x=False)


def _whole_numbers(axes: Axes, *, x: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    (axes.xaxis if x else axes.yaxis).set_major_locator(MaxNLocator(nbins=8, integer=True))


def log_scale(axes: Axes, low: float, high: float) -> None:
    """Logarithmic from a little below `low` to a little above `high`, with numbers such as 0.5 and 20 beside it."""
    from matplotlib.ticker import NullLocator

    bottom, top = low / 1.15, high * 1.15
    bases = (
        (1, 1.2, 1.5, 2, 3, 5, 7)
        if top / bottom < 10
        else (1, 2, 5)
        if top / bottom < 1e3
        else (1,)
    )
    ticks = [base * 10.0**power for power in range(-12, 13) for base in bases]
    shown = [tick for tick in ticks if bottom <= tick <= top]
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
