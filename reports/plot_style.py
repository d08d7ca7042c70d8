"""One look for all plots: sizes, fonts, and colours that differ for colour-blind eyes, on light and dark.

Called by whoever draws. Matplotlib is imported here when a figure is made, without pyplot and its global state.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PlotsUnavailable(Exception):
    """Matplotlib is not installed."""


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one background. `lines` are Okabe and Ito's, in the order in which they are used."""

    name: str
    background: str
    ink: str
    faint: str
    lines: tuple[str, ...]
    ramp: str  # matplotlib's name of the colour map for amounts


LIGHT: Final = Theme(
    name="light",
    background="#ffffff",
    ink="#1f2328",
    faint="#d0d7de",
    lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    ramp="cividis",
)
DARK: Final = Theme(
    name="dark",
    background="#161b22",
    ink="#e6edf3",
    faint="#30363d",
    lines=("#56b4e9", "#e69f00", "#2ec4a0", "#e59cc4", "#f0e442", "#5f9ee8"),
    ramp="cividis",
)

WIDTH: Final = 7.2  # inches
_DPI: Final = 140

Draw: TypeAlias = "Callable[[Figure, Theme], None]"


def require_matplotlib() -> None:
    """Raises `PlotsUnavailable`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotsUnavailable("plots need matplotlib: pip install matplotlib")


def png(draw: Draw, height: float, theme: Theme) -> bytes:
    """What `draw` puts on a figure of `height` inches, as PNG. Raises `PlotsUnavailable`."""
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_settings(theme)):
        figure = Figure(figsize=(WIDTH, height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, theme)
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})  # same run, same bytes
    return data.getvalue()


def titled(axes: Axes, title: str, x: str, y: str) -> None:
    """A title on the left and both labels; every axis says its unit."""
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def legend(axes: Axes) -> None:
    """Below the title's line, outside the data."""
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 1.15), ncols=4, borderaxespad=0.0)


def _settings(theme: Theme) -> Any:  # dict; matplotlib spells out each of its 300 keys as a type
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "grid.color": theme.faint,
        "grid.linewidth": 0.7,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }
