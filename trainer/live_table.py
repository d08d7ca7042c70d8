"""What a person sees while a prefix is trained: a table that renews itself, or plain lines where no one watches.

Observers of the loop. `on_record` runs on the loop's thread; on a terminal rich draws on a thread of its own, from
the last frozen `RunState`. Times come from the records: nothing here reads a clock.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.records import Record
from trainer.run_state import RunState, clock, sparkline

PLAIN_SECONDS: Final = 10.0  # between two plain lines that only say that it goes on
_REFRESH_PER_SECOND: Final = 4
_SPARKLINE: Final = 40
_BAR: Final = 40
_LEFT_OUT: Final = "-"


class LiveTable:
    """The table, as a context manager: what it last showed stays on the screen."""

    def __init__(self, title: str, console: Console) -> None:
        self._state = RunState()
        self._title = title
        self._live = Live(
            get_renderable=lambda: table(self._state, self._title),
            console=console,
            refresh_per_second=_REFRESH_PER_SECOND,
        )

    def on_record(self, record: Record) -> None:
        self._state = self._state.after(record)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()


class PlainLines:
    """One line at each held-out evaluation, warning and end, and now and then between; no control characters."""

    def __init__(self, title: str, console: Console, seconds: float = PLAIN_SECONDS) -> None:
        self._state = RunState()
        self._title = title
        self._console = console
        self._every = seconds
        self._next = 0.0

    def on_record(self, record: Record) -> None:
        self._state = self._state.after(record)
        match record["kind"]:
            case "begin":
                self._say(self._state.sizes)
            case "step" if self._state.seconds >= self._next:
                self._next = self._state.seconds + self._every
                self._say(line(self._state))
            case "held_out":
                self._say(held_out_line(self._state, int(record["step"])))
            case "warning":
                self._say(f"warning: {self._state.warnings[-1]}")
            case "end":
                self._say(f"ended: {end_of(self._state)}")

    def __enter__(self) -> Self:
        self._say(self._title)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """What there was to say is said."""

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def open_display(title: str, console: Console | None = None) -> LiveTable | PlainLines:
    """What fits where `console` (the standard output if left out) leads."""
    console = console or Console()
    shown = LiveTable if console.is_terminal else PlainLines
    return shown(title, console)


# ---- the table -----------------------------------------------------------------------------------


def table(state: RunState, title: str) -> RenderableType:
    """The run as it stands."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True, min_width=11)
    grid.add_column(overflow="fold")
    for name, value, remark in _rows(state):
        grid.add_row(name, value, Text(remark, style="dim"))
    head = Text.assemble((title, "bold"), f"  {state.sizes}")
    parts: list[RenderableType] = [head, _progress(state), grid]
    parts += [Text(f"warning: {text}", style="yellow") for text in dict.fromkeys(state.warnings)]
    if state.end_reason is not None:
        parts.append(Text(f"ended: {end_of(state)}", style="bold"))
    return Group(*parts)


def _progress(state: RunState) -> RenderableType:
    left = state.seconds_left
    grid = Table.grid(padding=(0, 2))
    remaining = "" if left is None or state.end_reason is not None else f"{clock(left)} left"
    times = f"{clock(state.seconds)} gone"
    bar = ProgressBar(total=max(state.num_steps, 1), completed=state.step, width=_BAR)
    grid.add_row(bar, f"step {state.step:,} of {state.num_steps:,}", times, remaining)
    return grid


def _rows(state: RunState) -> list[tuple[str, str, str]]:
    best = "" if state.best is None else f"best {number(state.best[1])} at step {state.best[0]:,}"
    rows = [
        ("loss", number(state.loss), sparkline(_log(state.losses), _SPARKLINE)),
        ("held-out loss", number(state.held_out_loss), best),
        *((name.replace("_", " "), f"{value:.1f}", "held out") for name, value in state.metrics),
        ("learning rate", _rate(state.learning_rate), ""),
        ("gradient norm", number(state.grad_norm), "before clipping"),
        ("tokens/s", _LEFT_OUT, ""),
    ]
    if state.tokens_per_second is not None:
        rows[-1] = ("tokens/s", f"{state.tokens_per_second:,.0f}", "")
    return rows


def _log(losses: tuple[float, ...]) -> tuple[float, ...]:
    """A loss falls by factors; on a linear scale all but the beginning would be one flat line."""
    return tuple(math.log(loss) if 0 < loss < math.inf else math.nan for loss in losses)


# ---- the lines -----------------------------------------------------------------------------------


def line(state: RunState) -> str:
    """The last step."""
    left = state.seconds_left
    parts = [
        f"step {state.step}/{state.num_steps}",
        f"loss {number(state.loss)}",
        f"learning rate {_rate(state.learning_rate)}",
        f"gradient norm {number(state.grad_norm)}",
        f"{state.tokens_per_second or 0:.0f} tokens/s",
    ]
    parts += [] if left is None else [f"{clock(left)} left"]
    return "  ".join(parts)


def held_out_line(state: RunState, step: int) -> str:
    """The evaluation after `step`, and the best so far."""
    metrics = "".join(f"  {name} {value:.1f}" for name, value in state.metrics)
    best = "" if state.best is None else f"  (best {number(state.best[1])} at step {state.best[0]})"
    return (
        f"step {step}/{state.num_steps}  held-out loss {number(state.held_out_loss)}{metrics}{best}"
    )


def end_of(state: RunState) -> str:
    """Why, after how long, and what is kept."""
    kept = (
        ""
        if state.best is None
        else f"; best held-out loss {number(state.best[1])} at step {state.best[0]}"
    )
    return f"{state.end_reason} at step {state.step} after {clock(state.seconds)}{kept}"


def number(value: float | None) -> str:
    """Four digits that carry meaning, or what it is instead of a number."""
    if value is None:
        return _LEFT_OUT
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _rate(value: float | None) -> str:
    return _LEFT_OUT if value is None else f"{value:.3g}"
