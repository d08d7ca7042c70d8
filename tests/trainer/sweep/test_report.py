"""A sweep's tables, curve and page: what was picked and why, and nothing that would be fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from reports.plot_style import DARK, PlotsUnavailable
from tests.trainer.sweep.sweeps import outcomes, setting
from trainer.sweep import report
from trainer.sweep.curve import draw_length_curve, lines_of
from trainer.sweep.pick import Summary, pick, summarise
from trainer.sweep.report import write_report
from trainer.sweep.settings import SweepConfig
from trainer.sweep.shown import as_rich, means_table, outcome_line, runs_table

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = "<script>alert('x')</script>&"
CONFIG = SweepConfig(data="d.jsonl", output="s", num_virtual_tokens=[1, 8])


def summaries() -> list[Summary]:
    return summarise(
        [
            *outcomes(setting(8), (0.10, 0.12), accuracy=(98.0, 99.0)),
            *outcomes(setting(1), (0.31, 0.33), accuracy=(60.0, 62.0)),
            *outcomes(setting(4), (0.115, 0.117), accuracy=(97.0, 97.0)),
            *outcomes(setting(4, "mlp", 0.005), (None, 0.09), accuracy=(0.0, 99.5)),
        ]
    )


def test_the_table_has_means_errors_the_pick_and_the_best() -> None:
    found = summaries()
    table = means_table(found, pick(found, "loss"))
    assert table.title == "Settings, init examples"
    assert table.header == ("P", "encoder", "learning rate", "seeds", "held-out loss", "accuracy %", "")  # fmt: skip
    assert table.rows == (
        ("1", "direct", "0.05", "2", "0.3200 ± 0.0100", "61.00 ± 1.00", ""),
        ("4", "direct", "0.05", "2", "0.1160 ± 0.0010", "97.00 ± 0.00", "picked"),
        ("4", "mlp", "0.005", "1 of 2", "0.0900 ± 0.0100 (e)", "99.50 ± 1.00 (e)", ""),
        ("8", "direct", "0.05", "2", "0.1100 ± 0.0100", "98.50 ± 0.50", "best"),
    )
    assert "(e): over the held-out examples" in table.note


def test_a_terminal_of_eighty_columns_shows_the_table_whole() -> None:
    found = summarise([o for s in summaries() for o in s.outcomes if s.setting.encoder == "direct"])
    console = Console(width=80, record=True)
    console.print(as_rich(means_table(found, pick(found, "loss"))))
    text = console.export_text()
    assert "0.1160 ± 0.0010" in text
    assert "…" not in text


def test_each_run_is_told_with_what_came_of_it() -> None:
    found = summaries()
    rows = runs_table(found).rows
    assert len(rows) == 8
    assert [row[1] for row in rows].count("failed: Diverged: the loss is nan") == 1
    assert rows[0][-3:] == ("7", "0:03", "")
    lines = [outcome_line(outcome) for summary in found for outcome in summary.outcomes]
    assert lines[0].endswith("-s0: loss 0.3100, accuracy 60.00, best at step 7 of 9")
    assert any(line.endswith("failed: Diverged: the loss is nan") for line in lines)


def test_the_curve_has_a_line_for_each_encoder_and_the_best_rate_at_each_length() -> None:
    found = summarise(
        [
            *outcomes(setting(2, rate=0.1), (0.5,)),
            *outcomes(setting(2, rate=0.2), (0.4,)),
            *outcomes(setting(9, rate=0.1), (0.2,)),
            *outcomes(setting(9, rate=0.2), (0.3,)),
            *outcomes(setting(9, "mlp"), (0.1,)),
        ]
    )
    lines = lines_of(found, "loss")
    assert list(lines) == ["direct, examples", "mlp, examples"]
    points = [(p.setting.num_virtual_tokens, p.setting.learning_rate) for p in lines["direct, examples"]]  # fmt: skip
    assert points == [(2, 0.2), (9, 0.1)]


def test_the_curve_is_drawn_for_both_themes_and_always_the_same() -> None:
    found = summaries()
    chosen = pick(found, "accuracy")
    light = draw_length_curve(found, "accuracy", chosen)
    assert light is not None
    assert light.startswith(PNG)
    assert light == draw_length_curve(found, "accuracy", chosen)
    assert light != draw_length_curve(found, "accuracy", None), "the pick is marked"
    assert light != draw_length_curve(found, "accuracy", chosen, DARK)


@pytest.mark.parametrize("losses", [(0.001, 3.0), (0.0, 1.0), (0.2, 0.2)])
def test_scores_far_apart_or_alike_can_be_drawn(losses: tuple[float, float]) -> None:
    found = summarise([*outcomes(setting(1), losses[:1]), *outcomes(setting(512), losses[1:])])
    assert draw_length_curve(found, "loss", pick(found, "loss")) is not None


def test_without_a_finished_run_there_is_no_curve_and_the_page_says_so(tmp_path: Path) -> None:
    found = summarise(outcomes(setting(2), (None,)))
    assert draw_length_curve(found, "loss", None) is None
    write_report(tmp_path, found, None, [CONFIG])
    page = (tmp_path / "report.html").read_text()
    assert "no run finished" in page
    assert "no setting finished with all seeds" in page


def test_the_page_has_the_pick_its_rule_the_curve_and_all_tables(tmp_path: Path) -> None:
    found = summaries()
    chosen = pick(found, "loss")
    assert chosen is not None

    write_report(tmp_path, found, chosen, [CONFIG])

    page = (tmp_path / "report.html").read_text()
    for shown in ("P = 4, direct, examples", chosen.rule[:40], "0.1160 ± 0.0010", chosen.run.name):
        assert shown in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "plots" / "length.png").read_bytes().startswith(PNG)


def test_whatever_comes_from_the_runs_is_escaped(tmp_path: Path) -> None:
    found = summarise(outcomes(setting(2, init="text", init_text=EVIL), (0.1,)))
    write_report(tmp_path, found, pick(found, "loss"), [CONFIG.model_copy(update={"data": EVIL})])
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_without_matplotlib_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise PlotsUnavailable("plots need matplotlib")

    monkeypatch.setattr(report, "draw_length_curve", missing)
    found = summaries()
    write_report(tmp_path, found, pick(found, "loss"), [CONFIG])
    assert "plots need matplotlib" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "plots").exists()
