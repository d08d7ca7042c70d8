"""A sweep's report: the pick and its rule, the length curve, the tables, in one HTML file that opens offline.

Called by `runs` when all is done, on the main thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from reports import html_page as html
from reports.plot_style import DARK, LIGHT, PlotsUnavailable
from trainer.errors import RunFolderFailed
from trainer.run_folder import write_durably
from trainer.sweep.curve import CAPTION, draw_length_curve
from trainer.sweep.pick import Pick, Summary
from trainer.sweep.settings import VARIED, SweepConfig
from trainer.sweep.shown import means_table, runs_table

REPORT: Final = "report.html"
PLOTS: Final = "plots"
LENGTH_CURVE: Final = "length.png"


def write_report(
    path: Path, summaries: Sequence[Summary], picked: Pick | None, configs: Sequence[SweepConfig]
) -> None:
    """Writes `report.html` and `plots/length.png` into the sweep's folder. Raises `RunFolderFailed`."""
    by = configs[0].pick_by
    try:
        light, dark = (draw_length_curve(summaries, by, picked, theme) for theme in (LIGHT, DARK))
        why_not = "no run finished"
    except PlotsUnavailable as reason:
        light, dark, why_not = None, None, str(reason)
    if light is not None:
        _make(path / PLOTS)
        write_durably(path / PLOTS / LENGTH_CURVE, light)
    curve = (
        f'<p class="soft">{escape(why_not)}</p>'
        if light is None or dark is None
        else html.figure(light, dark, CAPTION)
    )
    write_durably(path / REPORT, _page(path.name, summaries, picked, configs, curve).encode())


def _page(
    title: str,
    summaries: Sequence[Summary],
    picked: Pick | None,
    configs: Sequence[SweepConfig],
    curve: str,
) -> str:
    tables = (means_table(summaries, picked), runs_table(summaries))
    shared = configs[0].model_dump(mode="json", exclude=set(VARIED))
    body = (
        f"<h1>{escape(title)}</h1>",
        html.section("The pick", _pick(picked)),
        html.section("Length", curve),
        html.section("Results", "".join(map(html.table, tables))),
        html.section("Settings of all runs", html.settings(shared)),
    )
    return html.page(title, "\n".join(part for part in body if part))


def _pick(picked: Pick | None) -> str:
    if picked is None:
        return '<div class="finding warning"><p>None: not every run has ended, or no setting finished with all seeds.</p></div>'
    return (
        f'<div class="finding good"><h3>{escape(str(picked.picked.setting))}</h3>'
        f"<p>It is {escape(picked.rule)}.</p><p>Run: <code>{escape(picked.run.name)}</code></p></div>"
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunFolderFailed(f"{folder} could not be made: {error.strerror}") from error
