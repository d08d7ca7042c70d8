"""What the command line shows of errors, and of files and answers that others wrote. Called by the commands, on the main thread."""

from __future__ import annotations

from typing import Any


def show_error(error: Exception) -> None:
    """What went wrong, in a box on the standard error."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    box = Panel(Text(shown(str(error))), title="Error", title_align="left", style="red")
    Console(stderr=True).print(box)


def show_note(text: str) -> None:
    """Something for people, beside what a programme reads from the standard output."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(shown(text)), soft_wrap=True)


def lines_of(report: dict[str, Any]) -> list[str]:
    """A report of `server.engine.intake`, for a terminal."""
    probe = report["proof"]["probe"]
    shown = (
        "none"
        if probe is None
        else (
            f"reproduced, off by {probe['max_difference_nats']:.2g} nats of {probe['tolerance_nats']:g} allowed"
        )
    )
    lines = [
        f"recognised: {report['recognised']}",
        f"smoke:      {report['proof']['smoke']}: finite, and the row beside it unchanged to the bit",
        f"probe:      {shown}",
    ]
    for name in ("assumed", "unverified", "warnings"):
        title = f"{name.removesuffix('s')}:"
        lines += [f"{title:<11} {text}" for text in report[name]]
    return lines


def shown(text: str) -> str:
    """`text` with whatever could steer a terminal written out, line by line."""
    return "\n".join(
        "".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in text.split("\n")
    )
