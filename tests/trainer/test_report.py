"""The curves and the report of a run: complete, escaped, and without anything that would be fetched."""

from __future__ import annotations

import base64
import html.parser
import re
from collections.abc import Callable
from typing import Any

import pytest

from reports.html_page import ResultTable, flat
from reports.plot_style import DARK, PlotsUnavailable
from tests.trainer.synthetic_run import SyntheticRun
from trainer import report
from trainer.doctor import Failure, Finding, Severity
from trainer.plots import CAPTIONS, draw_plots
from trainer.report import report_html

PNG = b"\x89PNG\r\n\x1a\n"
RUN = SyntheticRun(num_steps=40, metrics={"exact_match": 93.0}, warnings=["separator"])
EVIL = "<script>alert('x')</script>&"


@pytest.fixture(scope="module")
def plots() -> dict[str, bytes]:
    """Drawn once: drawing is what takes long here."""
    return draw_plots(RUN.records(), RUN.config)


@pytest.fixture
def page(plots: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a report with these plots in both themes."""
    monkeypatch.setattr(report, "draw_plots", lambda *_: plots)

    def make(records: list[dict[str, Any]] | None = None, **changes: Any) -> str:
        given: dict[str, Any] = {"config": RUN.config, "findings": [], "title": "a task"} | changes
        return report_html(RUN.records() if records is None else records, **given)

    return make


class Outline(html.parser.HTMLParser):
    """Opened tags, attributes that point somewhere, and whether all that was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [v or "" for name, v in attrs if name in {"src", "href", "srcset", "data"}]
        if tag not in {"meta", "img", "source"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ---- plots -----------------------------------------------------------------------------------------


def test_a_run_with_everything_gets_every_plot(plots: dict[str, bytes]) -> None:
    assert list(plots) == list(CAPTIONS)
    assert all(data.startswith(PNG) for data in plots.values())


def test_what_was_not_recorded_is_not_drawn() -> None:
    records = [record for record in SyntheticRun().records() if record["kind"] != "prefix"]
    assert set(draw_plots(records, {})) == {"loss", "rate"}
    assert draw_plots([], {}) == {}


def test_the_same_run_gives_the_same_bytes(plots: dict[str, bytes]) -> None:
    assert draw_plots(RUN.records(), RUN.config) == plots


def test_the_dark_theme_has_the_same_plots_in_other_colours(plots: dict[str, bytes]) -> None:
    dark = draw_plots(RUN.records(), RUN.config, DARK)
    assert list(dark) == list(plots)
    assert all(dark[name] != plots[name] for name in dark)


def test_a_run_that_diverged_can_be_drawn() -> None:
    records = RUN.records()
    for record in records:
        if record["kind"] == "step" and record["step"] > 20:
            record.update(loss=None, grad_norm=float("inf"))
        if record["kind"] == "prefix" and record["step"] > 20:
            record.update(key_norms=[float("nan")] * 4, attention_mass=[float("nan")] * 4)
    assert set(draw_plots(records, RUN.config)) == set(CAPTIONS)


def test_a_run_of_one_evaluation_can_be_drawn() -> None:
    records = RUN.records()[:4]
    assert {"attention", "norms"} <= set(draw_plots(records, RUN.config))


# ---- the page --------------------------------------------------------------------------------------


def test_the_page_opens_offline_and_runs_nothing(page: Callable[..., str]) -> None:
    outline = Outline(page())
    assert outline.open == []
    assert "script" not in outline.tags
    assert "a" not in outline.tags
    assert len(outline.targets) == 2 * len(CAPTIONS)
    assert all(target.startswith("data:image/png;base64,") for target in outline.targets)
    assert "default-src 'none'" in page()
    assert "http://" not in page()
    assert "https://" not in page()
    assert "url(" not in page()


def test_its_images_are_whole(page: Callable[..., str]) -> None:
    for target in Outline(page()).targets:
        assert base64.b64decode(target.split(",")[1], validate=True).startswith(PNG)


def test_findings_stand_with_evidence_and_change(page: Callable[..., str]) -> None:
    finding = Finding(Failure.DEAD_PREFIX, Severity.ERROR, "It gets 0.01 %.", "Start from a text.")
    text = page(findings=[finding])
    for shown in ("dead prefix<span>error</span>", "It gets 0.01 %.", "Start from a text."):
        assert shown in text
    assert "Nothing found" not in text
    assert "Nothing found" in page()


def test_results_settings_and_warnings_stand_in_it(page: Callable[..., str]) -> None:
    table = ResultTable(
        "Evaluation", ("metric", "prefix"), (("exact match", "97.5 ± 0.4"),), "greedy"
    )
    text = page(results=[table], config={"encoder": "mlp", "mlp": {"hidden": 128}})
    for shown in (
        "<caption>Evaluation</caption>",
        '<td class="number">97.5 ± 0.4</td>',
        "<td>exact match</td>",
        "greedy",
        "<th>mlp.hidden</th><td><code>128</code></td>",
        "about separator",
        "Held-out data during the run",
        "40 (best)",
    ):
        assert shown in text


def test_whatever_comes_from_the_run_is_escaped(page: Callable[..., str]) -> None:
    records = [
        *RUN.records(),
        {"kind": "warning", "message": EVIL},
        {"kind": "held_out", "step": 50, "loss": 1.0, EVIL: 3.0},
        {"kind": "end", "reason": EVIL},
    ]
    finding = Finding(Failure.DEAD_PREFIX, Severity.ERROR, EVIL, EVIL)
    table = ResultTable(EVIL, (EVIL,), ((EVIL,),), EVIL)
    text = page(records, config={EVIL: EVIL}, findings=[finding], title=EVIL, results=[table])
    assert EVIL not in text
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 12
    assert Outline(text).open == []


def test_a_run_without_records_has_a_report() -> None:
    text = report_html([], {}, [], title="nothing yet")
    assert "not ended, 0 steps" in text
    assert Outline(text).targets == []


def test_long_settings_are_cut() -> None:
    [(name, value)] = flat({"init_text": "x" * 5_000})
    assert name == "init_text"
    assert re.fullmatch(r"x{2000} \.\.\. \(5,000 characters\)", value)


def test_without_matplotlib_the_report_says_why_there_are_no_curves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reports.plot_style.importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlotsUnavailable, match="pip install matplotlib"):
        draw_plots(RUN.records(), {})
    text = report_html(RUN.records(), {}, [], title="a task")
    assert "plots need matplotlib" in text
    assert Outline(text).targets == []
