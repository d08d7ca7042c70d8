"""A training run as one HTML file: findings, curves, results, settings. It opens offline and refers to nothing.

Called by `conclusion`. Pure, on any thread. Every text that comes from the run is escaped, images are part of the
file, and a policy in its head forbids the browser to fetch anything.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from trainer.doctor.finding import Finding
from trainer.history import History
from trainer.live_table import number
from trainer.plot_style import DARK, LIGHT, PlotsUnavailable
from trainer.plots import CAPTIONS, draw_plots
from trainer.records import Record
from trainer.report_style import STYLE
from trainer.run_state import clock

_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MAX_VALUE: Final = 2_000  # characters of one setting: an initial text may be a document


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table of results, such as an evaluation's. Cells are texts as they shall be read; numbers stand right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


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
        _section("The doctor", _findings(findings)),
        _section("Curves", _curves(kept, config)),
        _section("Results", "".join(_table(table) for table in (*results, *_held_out(history)))),
        _section("Warnings", _warnings(history)),
        _section("Settings", _settings(config)),
    )
    return _page(title, "\n".join(part for part in body if part))


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


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
    cells = (
        f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for n, v in shown
    )
    return f'<div class="tiles">{"".join(cells)}</div>' if shown else ""


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
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark[name])}">'
        f'<img src="{_data(light[name])}" alt="{escape(CAPTIONS[name])}"></picture>'
        f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
        for name in CAPTIONS
        if name in light
    )


def _data(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"


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


def _table(table: ResultTable) -> str:
    right = [
        all(_is_number(row[column]) for row in table.rows) for column in range(len(table.header))
    ]
    head = "".join(_cell("th", text, n) for text, n in zip(table.header, right, strict=True))
    rows = "".join(
        f"<tr>{''.join(_cell('td', text, n) for text, n in zip(row, right, strict=True))}</tr>"
        for row in table.rows
    )
    note = f'<p class="soft">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _cell(tag: str, text: str, is_number: bool) -> str:
    kind = ' class="number"' if is_number else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def _is_number(text: str) -> bool:
    """Whether it begins like one: `3.1 ± 0.2`, `+4`, `1,200 (best)`; and the empty cell."""
    return not text or text.lstrip("+-−")[:1].isdigit()


def _warnings(history: History) -> str:
    texts = dict.fromkeys(str(record.get("message", "")) for record in history.warnings)
    return "".join(f'<div class="finding warning"><p>{escape(text)}</p></div>' for text in texts)


def _settings(config: Mapping[str, Any]) -> str:
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
