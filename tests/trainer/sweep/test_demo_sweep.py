"""A real sweep over the demo's base: what is learned, and what the rule makes of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from demo.build.tasks import TASKS, examples
from server.engine.tokenizer import Tokenizer
from tests.trainer.demo_data import END_OF_TEXT, write_jsonl
from trainer.engine_in_process import EngineInProcess
from trainer.evaluate import EvaluationSettings, evaluate
from trainer.evaluation import PREFIX
from trainer.held_out import read_held_out
from trainer.records import read_records
from trainer.run_folder import RunFolder
from trainer.sweep.runs import sweep
from trainer.sweep.settings import SweepConfig

pytestmark = pytest.mark.slow

TASK = "sentence-to-record"


def write_csv(path: Path, count: int) -> Path:
    """Examples with the names that the base has seen, as the demo's prefixes were trained on."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows((e.prompt, e.answer) for e in examples(TASKS[TASK], 5, count, "train"))
    return path


def test_what_a_sweep_picks_has_learned_the_task_and_works_on_names_never_seen(
    tmp_path: Path, demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    config = SweepConfig(
        data=write_csv(tmp_path / "data.csv", 200),
        output=tmp_path / "lengths",
        held_out_fraction=0.15,
        num_virtual_tokens=[1, 8],
        encoder=["mlp"],
        init_text=[TASKS[TASK].init_text],
        batch_size=8,
        num_steps=40,
        evaluate_every=20,
        metric=["token_f1"],
        device="cpu",
        num_threads=1,
    )

    result = sweep([config])

    assert result.pick is not None
    assert result.prefix is not None
    log = read_records(RunFolder(result.prefix.parent).log)
    before = next(record["loss"] for record in log if record["kind"] == "held_out")
    score = result.pick.picked.scores["loss"]
    assert score.over == "examples"
    assert score.value <= result.pick.limit
    assert score.value < before / 3
    told = json.loads((tmp_path / "lengths" / "sweep.json").read_text())
    assert told["num_held_out"] == 30
    assert told["pick"]["run"] == result.prefix.parent.name
    assert (tmp_path / "lengths" / "report.html").is_file()
    assert (result.prefix.parent / "report.html").is_file()

    unseen, _ = read_held_out(
        write_jsonl(tmp_path / "unseen.jsonl", TASK, 30), demo_tokenizer, frozenset({END_OF_TEXT})
    )
    artifact = result.prefix.read_bytes()
    settings = EvaluationSettings(metrics=("token_f1",))
    found = evaluate(demo_engine, demo_tokenizer, artifact, unseen, settings).conditions[PREFIX]
    assert found.scores["loss"].value < before / 3
