"""What follows a run: its prefix is judged in process, and handed over to a server if that was asked for.

Main thread; called by `cli_train` with the base that the run has loaded.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from server.cli_client import CommandFailed
from trainer.cli_evaluate import general_text, progress_bar, read_bytes
from trainer.engine_in_process import EngineInProcess
from trainer.evaluate import EvaluationSettings, evaluate
from trainer.evaluation import Evaluation
from trainer.handover import HandOver, ServerAccess, hand_over, require_reachable
from trainer.judgement import keep
from trainer.promotion_rule import PromotionRule
from trainer.run_folder import RunFolder
from trainer.session import TrainResult


def judge_run(result: TrainResult, metrics: Sequence[str], max_examples: int) -> Evaluation:
    """The best prefix of a run on the first `max_examples` held-out examples; also kept in the run folder.

    Raises `PrefixRejected`, `BadData`, `RunFolderFailed`.
    """
    base = result.material.base
    model = RunFolder(result.folder).read_config().get("model")
    settings = EvaluationSettings(metrics=tuple(metrics), general_text=general_text(model, None))
    engine = EngineInProcess(base.model, base.tokenizer, base=base.spec)
    examples = result.material.held_out[:max_examples]
    with progress_bar("evaluate") as on_progress:
        found = evaluate(
            engine, base.tokenizer, read_bytes(result.prefix), examples, settings, on_progress
        )
    keep(result.folder, found)
    return found


def hand_over_run(
    result: TrainResult, task: str | None, rule: PromotionRule, url: str | None, key: str | None
) -> HandOver:
    """The best prefix of a run to the server at `url`, judged there on all held-out examples. As `hand_over`."""
    artifact, held_out = read_bytes(result.prefix), result.material.held_out
    name = task_of(result.folder, task)
    try:
        with progress_bar("judge") as on_progress:
            return hand_over(
                ServerAccess(url, key), artifact, name, rule, held_out, on_progress=on_progress
            )
    except CommandFailed as failed:
        again = f"--task {name} --push {url} --promote-if {shlex.quote(rule.text)}"
        raise CommandFailed(
            f"{failed}\nThe run is finished and its prefix kept. To hand it over later: "
            f"prefixd train --resume {result.folder} --evaluate 0 {again}",
            status=failed.status,
        ) from failed


def require_hand_over(folder: Path, task: str | None, url: str | None, key: str | None) -> None:
    """Raises `CommandFailed` if the server at `url` would not take a prefix of the run in `folder` now."""
    require_reachable(ServerAccess(url, key), task_of(folder, task))


def task_of(folder: Path, task: str | None) -> str:
    """The task's name, or that of the run's folder."""
    return task or folder.resolve().name
