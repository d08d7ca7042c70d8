"""A sweep's results as tables of text: for a terminal and for the report. Pure; called by `cli_sweep` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.table import Table

from reports.html_page import ResultTable
from trainer.config import LOSS
from trainer.run_state import clock
from trainer.sweep.pick import OVER_EXAMPLES, MeanScore, Outcome, Pick, Summary

_PICKED: Final = "picked"
_BEST: Final = "best"
_WORDS: Final = {"encoder", "init", ""}  # columns of words
_MAX_ERROR: Final = 300  # characters of a failure in the report


def means_table(summaries: Sequence[Summary], picked: Pick | None) -> ResultTable:
    """One row a setting: means over seeds, and standard errors. What all settings have in common stands in the title."""
    names = _score_names(summaries)
    columns = _setting_columns(summaries)
    varied = {title: cells for title, cells in columns.items() if len(set(cells)) > 1}
    varied.setdefault("P", columns["P"])
    same = [f"{title} {cells[0]}" for title, cells in columns.items() if title not in varied]
    rows = [
        (*(cells[index] for cells in varied.values()), *_mean_row(summary, names, picked))
        for index, summary in enumerate(summaries)
    ]
    shown = [score for summary in summaries for score in summary.scores.values()]
    note = "± one standard error, over the seeds"
    if any(score.over == OVER_EXAMPLES for score in shown):
        note += "; (e): over the held-out examples, where one seed finished"
    header = (*varied, "seeds", *map(_title, names), "")
    return ResultTable(", ".join(("Settings", *same)), header, tuple(rows), note)


def _setting_columns(summaries: Sequence[Summary]) -> dict[str, list[str]]:
    settings = [summary.setting for summary in summaries]
    return {
        "P": [str(setting.num_virtual_tokens) for setting in settings],
        "encoder": [setting.encoder for setting in settings],
        "init": [setting.start for setting in settings],
        "learning rate": [f"{setting.learning_rate:g}" for setting in settings],
    }


def runs_table(summaries: Sequence[Summary]) -> ResultTable:
    """One row a run, by the name of its folder."""
    names = _score_names(summaries)
    outcomes = [outcome for summary in summaries for outcome in summary.outcomes]
    header = ("run", "state", *map(_title, names), "best step", "time", "the doctor")
    return ResultTable("Runs", header, tuple(_run_row(outcome, names) for outcome in outcomes))


def as_rich(table: ResultTable) -> Table:
    """For a terminal."""
    found = Table(
        title=table.title, title_justify="left", caption=table.note or None, caption_justify="left"
    )
    for title in table.header:
        found.add_column(title, justify="right" if title not in _WORDS else "left")
    for row in table.rows:
        found.add_row(*row, style="bold" if row[-1].startswith(_PICKED) else None)
    return found


def outcome_line(outcome: Outcome) -> str:
    """What came of a run, in one line."""
    if outcome.state == "open":
        return f"{outcome.name}: not finished"
    if outcome.state == "failed":
        return f"{outcome.name}: failed: {outcome.error}"
    scores = ", ".join(
        f"{name.replace('_', ' ')} {_number(name, score.value)}"
        for name, score in outcome.scores.items()
    )
    found = f"; the doctor: {_findings(outcome)}" if outcome.findings else ""
    return (
        f"{outcome.name}: {scores}, best at step {outcome.best_step} of {outcome.num_steps}{found}"
    )


def _score_names(summaries: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(name for summary in summaries for name in summary.scores))


def _title(name: str) -> str:
    return "held-out loss" if name == LOSS else f"{name.replace('_', ' ')} %"


def _mean_row(summary: Summary, names: Sequence[str], picked: Pick | None) -> tuple[str, ...]:
    done, wanted = summary.num_finished, len(summary.outcomes)
    remark = ""
    if picked is not None:
        remarks = ((_PICKED, picked.picked), (_BEST, picked.best))
        remark = ", ".join(word for word, one in remarks if one.setting == summary.setting)
    return (
        str(done) if done == wanted else f"{done} of {wanted}",
        *(_mean(name, summary.scores.get(name)) for name in names),
        remark,
    )


def _mean(name: str, score: MeanScore | None) -> str:
    if score is None:
        return ""
    mark = " (e)" if score.over == OVER_EXAMPLES else ""
    return f"{_number(name, score.value)} ± {_number(name, score.standard_error)}{mark}"


def _run_row(outcome: Outcome, names: Sequence[str]) -> tuple[str, ...]:
    state = {"finished": "finished", "open": "not finished"}.get(
        outcome.state, f"failed: {(outcome.error or '')[:_MAX_ERROR]}"
    )
    scores = [
        _number(name, outcome.scores[name].value) if name in outcome.scores else ""
        for name in names
    ]
    step = "" if outcome.best_step is None else str(outcome.best_step)
    time = "" if outcome.seconds is None else clock(outcome.seconds)
    return (outcome.name, state, *scores, step, time, _findings(outcome))


def _findings(outcome: Outcome) -> str:
    return ", ".join(name.replace("_", " ") for name in outcome.findings)


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name == LOSS else f"{value:.2f}"
