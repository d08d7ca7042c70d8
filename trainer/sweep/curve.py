"""The length curve of the paper: score against P, with error bars, one line for each encoder and beginning.

Called by `report`. Pure, on any thread; matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from reports.plot_style import LIGHT, Theme, png, titled
from trainer.config import LOSS
from trainer.plots import log_scale
from trainer.sweep.pick import Pick, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION: Final = (
    "Held-out scores by prefix length. Bars: one standard error. Star: the prefix that was picked, dashed: how good "
    "it had to be. Where several learning rates were tried, each point is the best of them"
)
_HEIGHT: Final = 3.0  # inches, of each panel
_LOG_SPAN: Final = 20  # scores further apart than this are one flat line on a linear scale
_MARKERS: Final = "osD^vP"
_STYLES: Final = ("-", "--", ":", "-.")


def draw_length_curve(
    summaries: Sequence[Summary], by: str, picked: Pick | None, theme: Theme = LIGHT
) -> bytes | None:
    """PNG with one panel a score; None if no run finished. Raises `PlotsUnavailable`."""
    measured = [summary for summary in summaries if summary.scores]
    if not measured:
        return None
    names = list(measured[0].scores)
    return png(partial(_draw, measured, names, by, picked), _HEIGHT * len(names), theme)


def lines_of(summaries: Sequence[Summary], by: str) -> dict[str, list[Summary]]:
    """The points of each line by rising P: of several learning rates the best one."""
    found: dict[str, dict[int, Summary]] = {}
    worse = 1.0 if by == LOSS else -1.0
    for summary in summaries:
        setting = summary.setting
        points = found.setdefault(f"{setting.encoder}, {setting.start}", {})
        rival = points.get(setting.num_virtual_tokens)
        if rival is None or worse * summary.scores[by].value < worse * rival.scores[by].value:
            points[setting.num_virtual_tokens] = summary
    return {name: [points[length] for length in sorted(points)] for name, points in found.items()}


def _draw(
    summaries: Sequence[Summary],
    names: Sequence[str],
    by: str,
    picked: Pick | None,
    figure: Figure,
    theme: Theme,
) -> None:
    panels = figure.subplots(len(names), squeeze=False, sharex=True)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        unit = "nats a completion token" if name == LOSS else "%"
        label = "prefix length P (log)" if axes is panels[-1] else ""
        titled(axes, f"Held-out {name.replace('_', ' ')}", label, unit)
        for index, (line, points) in enumerate(lines_of(summaries, by).items()):
            _line(axes, points, name, line, index, theme)
        if picked is not None:
            _mark(axes, name, picked, theme)
        values = [summary.scores[name].value for summary in summaries]
        if name == LOSS and max(values) > _LOG_SPAN * min(values) > 0:
            log_scale(axes, min(values), max(values))
            axes.set_ylabel(f"{unit} (log)")
    _lengths(panels[-1], summaries)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _line(
    axes: Axes, points: Sequence[Summary], name: str, label: str, index: int, theme: Theme
) -> None:
    scores = [point.scores[name] for point in points]
    axes.errorbar(
        [point.setting.num_virtual_tokens for point in points],
        [score.value for score in scores],
        yerr=[score.standard_error for score in scores],
        label=label,
        color=theme.lines[index % len(theme.lines)],
        linestyle=_STYLES[index // len(theme.lines) % len(_STYLES)],
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=4,
        capsize=3,
        elinewidth=1,
    )


def _mark(axes: Axes, name: str, picked: Pick, theme: Theme) -> None:
    setting, score = picked.picked.setting, picked.picked.scores[name]
    axes.plot(
        setting.num_virtual_tokens, score.value,
        marker="*", markersize=15, linestyle="", color=theme.ink, zorder=3, label="picked",
    )  # fmt: skip
    if name == picked.by:
        axes.axhline(picked.limit, color=theme.ink, linestyle="--", linewidth=1)


def _lengths(axes: Axes, summaries: Sequence[Summary]) -> None:
    """The lengths that were tried, and no others, on a logarithmic axis."""
    from matplotlib.ticker import NullLocator

    lengths = sorted({summary.setting.num_virtual_tokens for summary in summaries})
    axes.set_xscale("log")
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths, [str(length) for length in lengths])
