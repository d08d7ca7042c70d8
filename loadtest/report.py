"""What a load test leaves in its folder: `report.html`, which opens offline and refers to nothing, the plots, the figures.

Main thread; called by `cli_bench`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.plots import CAPTIONS, Measured, draw_plots
from loadtest.tables import tables
from reports import html_page as html
from reports.html_page import ResultTable
from reports.plot_style import DARK, LIGHT


def write_report(folder: Path, measured: Measured, figures: Mapping[str, Any]) -> None:
    """Writes the folder, which may exist. Raises `LoadTestError` if it can not be written."""
    plots, dark = (draw_plots(measured, theme) for theme in (LIGHT, DARK))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in plots.items():
            (folder / f"{name}.png").write_bytes(data)
        write_json(folder / "figures.json", figures)
        (folder / "report.html").write_text(page(figures, plots, dark), encoding="utf-8")
    except OSError as error:
        raise LoadTestError(f"{error.filename or folder}: {error.strerror}") from None


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """The figures, for people and programmes. Raises `LoadTestError`."""
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise LoadTestError(f"{path}: {error.strerror}") from None


def page(figures: Mapping[str, Any], plots: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """The whole file. The plots on a light and on a dark background, by name."""
    server = figures["server"]
    title = f"Load test of {server['model']}"
    shown = tables(figures["runs"])
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(server["url"])}, {escape(figures["measured_at"])}</p>',
    ]
    parts += [f'<div class="finding warning">{escape(x)}</div>' for x in all_warnings(figures)]
    parts += [html.table(table) for table in shown[:1]]
    parts += [
        html.figure(plots[name], dark[name], caption)
        for name, caption in CAPTIONS.items()
        if name in plots
    ]
    parts += [html.table(table) for table in shown[1:]]
    parts.append(html.table(_settings(figures)))
    return html.page(title, "\n".join(parts))


def all_warnings(figures: Mapping[str, Any]) -> list[str]:
    """Of the whole test first, then of each run."""
    found = list(figures["notes"])
    for run in figures["runs"]:
        found += [f"{run['tasks']} tasks: {text}" for text in run["warnings"]]
    return found


def _settings(figures: Mapping[str, Any]) -> ResultTable:
    given = {**figures["server"], **figures["settings"]}
    rows = tuple((name, json.dumps(value).strip('"')) for name, value in given.items())
    return ResultTable("Settings", ("setting", "value"), rows)
