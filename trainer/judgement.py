"""A finished run's prefix, judged beside its baselines: in the terminal, in the run folder, in the report.

Main thread; called by `cli_train` when a run has ended, and by `conclusion`, which puts what it finds in the folder
into the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from reports.html_page import ResultTable
from trainer.evaluation import LOSS, NO_PREFIX, PREFIX, TEXT_PROMPT, Evaluation
from trainer.run_folder import write_durably

EVALUATION: Final = "evaluation.json"
_UNITS: Final = "scores in percent, loss in nats a token; ± is one standard error over the examples"
_SHOWN: Final = {PREFIX: "prefix", NO_PREFIX: "no prefix", TEXT_PROMPT: "text prompt"}


def keep(folder: Path, found: Evaluation) -> None:
    """Writes an evaluation into a run folder. Raises `RunFolderFailed`."""
    write_durably(folder / EVALUATION, found.as_json().encode())


def result_tables(folder: Path) -> Sequence[ResultTable]:
    """The evaluation that is kept in a run folder, for its report; none if there is none, or none that can be read."""
    try:
        found = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        return (_table(found),)
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _table(found: Mapping[str, Any]) -> ResultTable:
    conditions = found["conditions"]
    names = [name for name in _SHOWN if name in conditions]
    rows = [
        (metric, *(_cell(metric, conditions[name]["scores"][metric]) for name in names))
        for metric in conditions[PREFIX]["scores"]
    ]
    title = f"{found['num_examples']} held-out examples, P = {found['num_virtual_tokens']}, greedy"
    notes = [_UNITS]
    if found["text_prompt"]:
        notes.append(f"text prompt: {found['text_prompt']}")
    notes += found["notes"]
    if found["forgetting"]:
        notes.append(_forgetting(found["forgetting"]))
    return ResultTable(
        title, ("metric", *(_SHOWN[n] for n in names)), tuple(rows), "; ".join(notes)
    )


def _cell(metric: str, score: Mapping[str, Any]) -> str:
    """A number that is none (an infinite perplexity) is null in the file."""
    value, error = score["value"], score["standard_error"]
    if value is None:
        return "infinite"
    digits = 4 if metric == LOSS else 2
    return (
        f"{value:.{digits}f} ± {error:.{digits}f}" if error is not None else f"{value:.{digits}f}"
    )


def _forgetting(found: Mapping[str, Any]) -> str:
    with_prefix, without = found["with_prefix"]["value"], found["without"]["value"]
    shown = "infinite" if with_prefix is None else f"{with_prefix:.2f}"
    return f"perplexity of general text ({found['source']}): {shown} behind the prefix, {without:.2f} without"
