"""How a load test goes on, on standard error: a line that renews itself on a terminal, else a line now and then.

Runs where it is called: on the main thread while tasks are made, on the event loop while requests are sent.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from loadtest.recorder import Recorder

REFRESH_SECONDS: Final = 0.25
PLAIN_SECONDS: Final = 10.0
_RATE_SECONDS: Final = 5  # tok/s is a mean over these


class Progress:
    """A context manager; what it showed last goes from a terminal, and stays in a file."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._live: Live | None = None
        self._next = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, text: str, *, now: bool = False) -> None:
        """Says it, unless something was said a moment ago; `now`: whatever was said."""
        clock = time.monotonic()
        if clock < self._next and not now:
            return
        if self._live is not None:
            self._next = clock + REFRESH_SECONDS
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self._next = clock + PLAIN_SECONDS
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def count(self, what: str, done: int, total: int) -> None:
        """So many of so many."""
        self.show(f"{what}: {done} of {total}", now=done in (0, total))


def line(title: str, record: Recorder, now: float) -> str:
    """A run as it stands, `now` seconds after its start."""
    total = len(record.traffic)
    phase = "warming up" if now < record.warmup_seconds else f"{max(now, 0):.0f} s"
    return (
        f"{title}  {phase}  sent {record.num_sent}/{total}  running {record.num_under_way}  "
        f"done {record.num_done}  failed {record.num_failed}  {_rate(record, now):,.0f} tok/s"
    )


def _rate(record: Recorder, now: float) -> float:
    """Tokens per second of the last whole seconds."""
    end = min(int(max(now, 0)), len(record.tokens_per_bin))
    begin = max(end - _RATE_SECONDS, 0)
    return float(record.tokens_per_bin[begin:end].sum()) / max(end - begin, 1)
