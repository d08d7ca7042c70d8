"""What a load test leaves in its folder: `report.html`, which opens offline and refers to nothing, the plots, the figures.

Main thread; called by `cli_bench`. Every text is escaped; images are part of the page, and a policy in its head forbids
the browser to fetch anything.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

from loadtest.errors import LoadTestError
from loadtest.plots import CAPTIONS, Measured, draw_plots
from loadtest.tables import ResultTable, tables

_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE: Final = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: #1f2328; background: #ffffff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid #d0d7de; }
.soft { color: #59636e; font-size: .9rem; }
.warning { border-left: 5px solid #8a5300; background: #f6f8fa; border-radius: 8px; padding: .6rem 1rem; margin: .8rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d0d7de; text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; }
figure { margin: 1rem 0 1.6rem; }
figure img { width: 100%; height: auto; border: 1px solid #d0d7de; border-radius: 8px; display: block; }
figcaption { color: #59636e; font-size: .9rem; margin-top: .35rem; }
"""


def write_report(folder: Path, measured: Measured, figures: Mapping[str, Any]) -> None:
    """Writes the folder, which may exist. Raises `LoadTestError` if it can not be written."""
    plots = draw_plots(measured)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in plots.items():
            (folder / f"{name}.png").write_bytes(data)
        write_json(folder / "figures.json", figures)
        (folder / "report.html").write_text(page(figures, plots), encoding="utf-8")
    except OSError as error:
        raise LoadTestError(f"{error.filename or folder}: {error.strerror}") from None


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """The figures, for people and programmes. Raises `LoadTestError`."""
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise LoadTestError(f"{path}: {error.strerror}") from None


def page(figures: Mapping[str, Any], plots: Mapping[str, bytes]) -> str:
    """The whole file."""
    server = figures["server"]
    title = f"Load test of {server['model']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(server["url"])}, {escape(figures["measured_at"])}</p>',
    ]
    parts += [f'<div class="warning">{escape(text)}</div>' for text in all_warnings(figures)]
    parts += [_table(table) for table in tables(figures["runs"])[:1]]
    parts += [_figure(plots[name], caption) for name, caption in CAPTIONS.items() if name in plots]
    parts += [_table(table) for table in tables(figures["runs"])[1:]]
    parts.append(_table(_settings(figures)))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def all_warnings(figures: Mapping[str, Any]) -> list[str]:
    """Of the whole test first, then of each run."""
    found = list(figures["notes"])
    for run in figures["runs"]:
        found += [f"{run['tasks']} tasks: {text}" for text in run["warnings"]]
    return found


def _settings(figures: Mapping[str, Any]) -> ResultTable:
    given = {**figures["server"], **figures["settings"]}
    rows = tuple((name, json.dumps(value).strip('"')) for name, value in given.items())
    return ResultTable("Settings", ("setting", "value"), rows, num_names=2)


def _table(content: ResultTable) -> str:
    head = "".join(
        _cell("th", text, n < content.num_names) for n, text in enumerate(content.header)
    )
    rows = "".join(
        f"<tr>{''.join(_cell('td', text, n < content.num_names) for n, text in enumerate(row))}</tr>"
        for row in content.rows
    )
    note = f'<p class="soft">{escape(content.note)}</p>' if content.note else ""
    return (
        f'<h2>{escape(content.title)}</h2>\n<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _cell(tag: str, text: str, is_name: bool) -> str:
    kind = ' class="text"' if is_name else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def _figure(image: bytes, caption: str) -> str:
    data = base64.b64encode(image).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
