"""A training run as one HTML file: findings, curves, results, settings. It opens offline and refers to nothing.

Called by `conclusion`. Pure, on any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from reports import html_page as html
from reports.html_page import ResultTable
from reports.plot_style import DARK, LIGHT, PlotsUnavailable
from trainer.doctor.finding import Finding
from trainer.history import History
from trainer.live_table import number
from trainer.plots import CAPTIONS, draw_plots
from trainer.records import Record
from trainer.run_state import clock


def report_html(
    records: Iterable[Record],
    config: Mapping[str, Any],
    findings: Sequence[Finding],
    *,
    title: str,
    results: Sequence[ResultTable] = (),
) -> str:
    """The whole page."""
    kept = list(records)
    history = History.of(kept)
    body = (
        f"<h1>{escape(title)}</h1>",
        _subtitle(history),
        _tiles(history),
        html.section("The doctor", _findings(findings)),
        html.section("Curves", _curves(kept, config)),
        html.section(
            "Results", "".join(html.table(table) for table in (*results, *_held_out(history)))
        ),
        html.section("Warnings", _warnings(history)),
        html.section("Settings", html.settings(config)),
    )
    return html.page(title, "\n".join(part for part in body if part))


# ---- the top ---------------------------------------------------------------------------------------


def _subtitle(history: History) -> str:
    end = "not ended" if history.end is None else f"ended: {history.end['reason']}"
    seconds = history.steps[-1].get("seconds") if history.steps else None
    after = "" if seconds is None else f" after {clock(seconds)}"
    return f'<p class="soft">{escape(end)}, {history.num_steps:,} steps{after}</p>'


def _tiles(history: History) -> str:
    held = history.held_out_loss()
    best = history.best()
    tiles = [
        ("held-out loss at first", number(held[0][1]) if held else None),
        ("best held-out loss", number(best[1]) if best else None),
        ("at step", f"{best[0]:,}" if best else None),
        *(
            (name.replace("_", " "), f"{values[-1][1]:.1f}")
            for name, values in history.metrics().items()
        ),
        ("tokens trained on", _num_tokens(history)),
        ("tokens a second", _pace(history)),
    ]
    shown = [(label, value) for label, value in tiles if value is not None]
    return html.tiles(shown)


def _num_tokens(history: History) -> str | None:
    counts = [int(record["num_tokens"]) for record in history.steps if "num_tokens" in record]
    return f"{sum(counts):,}" if counts else None


def _pace(history: History) -> str | None:
    """Of the median step: the first steps are slow, and so are those that stand beside an evaluation."""
    paces = sorted(
        float(r["tokens_per_second"]) for r in history.steps if r.get("tokens_per_second")
    )
    return f"{paces[len(paces) // 2]:,.0f}" if paces else None


# ---- the sections ----------------------------------------------------------------------------------


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<div class="finding good"><p>Nothing found: none of the known failure modes shows in this run.</p></div>'
    return "\n".join(
        f'<div class="finding {found.severity.name.lower()}">'
        f"<h3>{escape(found.name.replace('_', ' '))}<span>{found.severity.name.lower()}</span></h3>"
        f"<p>{escape(found.evidence)}</p><p><b>Change:</b> {escape(found.change)}</p></div>"
        for found in findings
    )


def _curves(records: Sequence[Record], config: Mapping[str, Any]) -> str:
    try:
        light, dark = (draw_plots(records, config, theme) for theme in (LIGHT, DARK))
    except PlotsUnavailable as reason:
        return f'<p class="soft">{escape(str(reason))}</p>'
    return "\n".join(
        html.figure(light[name], dark[name], CAPTIONS[name]) for name in CAPTIONS if name in light
    )


def _held_out(history: History) -> list[ResultTable]:
    """Every evaluation during the run."""
    if not history.held_out:
        return []
    metrics = {name: dict(values) for name, values in history.metrics().items()}
    best = history.best()
    rows = [
        (
            f"{step:,}" + (" (best)" if best and best[0] == step else ""),
            number(loss),
            *(f"{values[step]:.1f}" if step in values else "" for values in metrics.values()),
        )
        for step, loss in history.held_out_loss()
    ]
    header = ("step", "loss, nats a token", *(name.replace("_", " ") for name in metrics))
    return [ResultTable("Held-out data during the run", header, tuple(rows))]


def _warnings(history: History) -> str:
    texts = dict.fromkeys(str(record.get("message", "")) for record in history.warnings)
    return "".join(f'<div class="finding warning"><p>{escape(text)}</p></div>' for text in texts)
