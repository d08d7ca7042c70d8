"""The folder of a sweep, and its one file that is read again: `sweep.json`.

    sweep.json     the settings, every run's state and scores, the means, the pick: renewed after each run
    report.html    made from it
    plots/         made from it
    runs/NAME/     an ordinary run folder each

Main thread; called by `runs`. A run whose folder says that it ended is not run again, whatever `sweep.json` says;
`sweep.json` saves measuring its prefix once more.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from server import __version__
from trainer.checkpoint import Origin
from trainer.errors import CannotResume, RunExists, RunFolderFailed
from trainer.finite_json import finite
from trainer.run_folder import write_durably
from trainer.standard_error import Score
from trainer.sweep.pick import Outcome, Pick, Setting, Summary
from trainer.sweep.settings import SweepConfig, shared_settings

SWEEP_FILE: Final = "sweep.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What a sweep folder knew before. `outcomes`: by the run's name."""

    configs: tuple[SweepConfig, ...]
    origin: Origin
    outcomes: Mapping[str, Outcome]


def read_sweep(path: Path) -> Found | None:
    """None where nothing is. Raises `RunExists` for a folder of something else, `CannotResume` for a damaged one."""
    file = path / SWEEP_FILE
    if not file.exists():
        if path.is_dir() and any(path.iterdir()):
            raise RunExists(f"{path} is not empty and holds no sweep: choose another --output")
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        configs = tuple(SweepConfig(**(config | {"output": path})) for config in found["configs"])
        outcomes = [_outcome(run) for run in found["runs"]]
        origin = Origin(**found["origin"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CannotResume(f"{file} is no sweep of this program: {error!r}") from None
    return Found(configs, origin, {outcome.name: outcome for outcome in outcomes})


def require_same_sweep(found: Found, configs: Sequence[SweepConfig], origin: Origin) -> None:
    """What is varied may differ: a sweep may be given more lengths or seeds. Raises `RunExists` or `CannotResume`."""
    before, now = shared_settings(found.configs[0]), shared_settings(configs[0])
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise RunExists(
            f"{configs[0].output} holds a sweep with other settings ({', '.join(changed)}): choose another --output"
        )
    if found.origin != origin:
        raise CannotResume(
            "since the sweep began, its data or the weights of its base changed; begin a new one"
        )


def make_folder(path: Path) -> None:
    """The sweep's folder, if it is not there yet. Raises `RunFolderFailed`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderFailed(f"{path} could not be made: {error.strerror}") from error


def write_sweep(
    path: Path,
    configs: Sequence[SweepConfig],
    origin: Origin,
    num_held_out: int,
    summaries: Sequence[Summary],
    pick: Pick | None,
) -> None:
    """Replaces `sweep.json`, or leaves it as it was. Raises `RunFolderFailed`."""
    outcomes = [outcome for summary in summaries for outcome in summary.outcomes]
    content = {
        "program": f"prefixd {__version__}",
        "configs": [config.model_dump(mode="json", exclude={"output"}) for config in configs],
        "origin": dataclasses.asdict(origin),
        "num_held_out": num_held_out,
        "runs": [dataclasses.asdict(outcome) for outcome in outcomes],
        "settings": [_told(summary) for summary in summaries],
        "pick": None if pick is None else _picked(pick),
    }
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    make_folder(path)
    write_durably(path / SWEEP_FILE, f"{text}\n".encode())


def _told(summary: Summary) -> dict[str, Any]:
    return {
        **dataclasses.asdict(summary.setting),
        "num_seeds": len(summary.outcomes),
        "num_finished": summary.num_finished,
        "scores": {name: dataclasses.asdict(score) for name, score in summary.scores.items()},
    }


def _picked(pick: Pick) -> dict[str, Any]:
    return {
        "by": pick.by,
        "rule": pick.rule,
        "limit": pick.limit,
        "setting": dataclasses.asdict(pick.picked.setting),
        "best": dataclasses.asdict(pick.best.setting),
        "run": pick.run.name,
    }


def _outcome(run: dict[str, Any]) -> Outcome:
    scores = {
        name: Score(score["value"], math.nan if score["standard_error"] is None else score["standard_error"])
        for name, score in run["scores"].items()
    }  # fmt: skip
    rest = {
        "setting": Setting(**run["setting"]),
        "scores": scores,
        "findings": tuple(run["findings"]),
    }
    return Outcome(**(run | rest))
