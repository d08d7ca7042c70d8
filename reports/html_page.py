"""Parts of a report in HTML: one file that opens offline and refers to nothing.

Called by whoever writes a report. Pure, on any thread. Every text is escaped here, images are part of the file, and a policy in
its head forbids the browser to fetch anything.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from reports.style_sheet import STYLE

_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MAX_VALUE: Final = 2_000  # characters of one setting: an initial text may be a document


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table of results, such as an evaluation's. Cells are texts as they shall be read; numbers stand right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def is_number(self) -> tuple[bool, ...]:
        """Of each column, whether it holds numbers alone."""
        return tuple(all(map(_is_number, cells)) for cells in zip(*self.rows, strict=True))


def page(title: str, body: str) -> str:
    """The whole file; `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A headed part; nothing for no content, which is HTML."""
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def tiles(shown: Sequence[tuple[str, str]]) -> str:
    """Labels and values, side by side."""
    cells = (
        f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for n, v in shown
    )
    return f'<div class="tiles">{"".join(cells)}</div>' if shown else ""


def figure(light: bytes, dark: bytes, caption: str) -> str:
    """One of two PNGs, by the reader's theme."""
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(caption)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _data(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"


def table(content: ResultTable) -> str:
    """With its note below it."""
    right = content.is_number or (False,) * len(content.header)
    head = "".join(_cell("th", text, n) for text, n in zip(content.header, right, strict=True))
    rows = "".join(
        f"<tr>{''.join(_cell('td', text, n) for text, n in zip(row, right, strict=True))}</tr>"
        for row in content.rows
    )
    note = f'<p class="soft">{escape(content.note)}</p>' if content.note else ""
    return (
        f'<div class="scroll"><table><caption>{escape(content.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _cell(tag: str, text: str, is_number: bool) -> str:
    kind = ' class="number"' if is_number else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def _is_number(text: str) -> bool:
    """Whether it begins like one: `3.1 ± 0.2`, `+4`, `1,200 (best)`; and the cell that has none, empty or `-`."""
    digits = text.lstrip("+-−")
    return not digits or digits[0].isdigit()


def settings(config: Mapping[str, Any]) -> str:
    """Names and values, one a row."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>"
        for name, value in flat(config)
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>' if rows else ""


def flat(config: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """`data.fraction` and the like with their values, long ones cut."""
    rows: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{above}{name}.")
            continue
        shown = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
        cut = f" ... ({len(shown):,} characters)" if len(shown) > _MAX_VALUE else ""
        rows.append((f"{above}{name}", shown[:_MAX_VALUE] + cut))
    return rows
