"""The report opens anywhere, needs nothing, and shows what was measured."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtest.cli_bench import bench
from loadtest.errors import BadLoad, LoadTestError
from loadtest.plots import CAPTIONS
from loadtest.progress import Progress, line
from loadtest.recorder import Outcome, Recorder
from loadtest.report import write_report
from loadtest.summary import summarise
from loadtest.tables import tables
from tests.loadtest.runs import answered, traffic_at, unanswered

HOSTILE = '503 <script>alert("x")</script>'


def measured(num_tasks: int) -> tuple[dict[str, Any], Recorder]:
    record = Recorder(traffic_at(*(0.1 * n for n in range(30)), num_tasks=5), 1.0, 3.0)
    for index in range(28):
        at = 0.1 * index
        answered(record, index, at + 0.02 * num_tasks, at + 0.2, "host" if index % 3 else "device")
    unanswered(record, 28, Outcome.REFUSED, HOSTILE)
    record.sent(29, 2.9)
    counters = {'prefix_cache_lookups_total{result="host"}': 14.0, "preemptions_total": 0.0}
    return {**summarise(record, num_tasks, 0.5), "server_counters": counters}, record


def figures_of(*runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "measured_at": "2026-01-01T00:00:00+00:00",
        "server": {"url": "http://gate:8000", "model": "org/<b>tiny</b>", "version": "1"},
        "settings": {"rate": 10.0},
        "notes": ["lengths were cut"],
        "interrupted": False,
        "runs": list(runs),
    }


class Attributes(HTMLParser):
    """What a browser would fetch, and which elements there are."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            value or "" for name, value in attributes if name in ("src", "srcset", "href", "data")
        ]


def test_the_report_refers_to_nothing_outside_itself_and_escapes_what_it_shows(
    tmp_path: Path,
) -> None:
    runs = [measured(1), measured(5), measured(100)]

    write_report(tmp_path / "new" / "out", runs, figures_of(*(run for run, _ in runs)))

    folder = tmp_path / "new" / "out"
    text = (folder / "report.html").read_text()
    seen = Attributes()
    seen.feed(text)
    assert len(seen.fetched) == 2 * len(CAPTIONS), "on light and on dark"
    assert all(value.startswith("data:image/png;base64,") for value in seen.fetched)
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text
    assert not {"script", "link", "iframe", "b"} & set(seen.tags)
    assert "&lt;script&gt;" in text
    assert {path.name for path in folder.iterdir()} == {
        "report.html",
        "figures.json",
        *(f"{name}.png" for name in CAPTIONS),
    }
    assert all((folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in CAPTIONS)
    assert json.loads((folder / "figures.json").read_text())["runs"][2]["tasks"] == 100


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    run, record = measured(1)

    with pytest.raises(LoadTestError, match="out: "):
        write_report(tmp_path / "out", [(run, record)], figures_of(run))


def test_plots_without_matplotlib_are_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(BadLoad, match="--out: plots need matplotlib"):
        bench("http://127.0.0.1:1", out=tmp_path / "out")


def test_the_tables_show_what_was_measured() -> None:
    throughput, latency, tiers, refusals, counters = tables([measured(0)[0], measured(5)[0]])

    assert [row[0] for row in throughput.rows] == ["base", "5"]
    assert throughput.rows[1][4] == "1.000"
    assert throughput.rows[1][5:9] == ("18", "1", "0", "1")
    ttft = latency.rows[4]
    assert ttft[:3] == ("5", "TTFT", "100")
    assert ("5", "cold") in [row[:2] for row in tiers.rows]
    assert refusals.rows[0] == ("base", HOSTILE, "1")
    assert [row[1:] for row in counters.rows] == [
        ('prefix_cache_lookups_total{result="host"}', "14")
    ] * 2, "what did not move is left out"


def test_progress_is_a_line_of_what_is_under_way() -> None:
    _, record = measured(5)

    shown = line("5 tasks", record, 2.5)

    assert shown.startswith("5 tasks  2 s  sent 30/30  running 1  done 28  failed 1")
    assert "warming up" in line("5 tasks", record, 0.5)
    assert shown.endswith("tok/s")


def test_progress_in_a_file_is_a_line_now_and_then() -> None:
    file = io.StringIO()
    with Progress(Console(file=file, width=80)) as progress:
        for number in range(100):
            progress.count("making tasks", number, 100)
        progress.count("making tasks", 100, 100)

    assert file.getvalue().splitlines() == ["making tasks: 0 of 100", "making tasks: 100 of 100"]


def test_progress_on_a_terminal_renews_one_line_and_leaves_none() -> None:
    file = io.StringIO()
    with Progress(Console(file=file, width=80, force_terminal=True)) as progress:
        progress.show("first")
        progress.show("second", now=True)

    text = file.getvalue()
    assert "second" in text
    assert "\x1b[2K" in text, "the line is erased"
