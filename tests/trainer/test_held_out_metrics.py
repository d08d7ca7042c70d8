"""A run that is selected by what its prefix generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.engine.tokenizer import Tokenizer
from tests.trainer.demo_data import END_OF_TEXT, write_jsonl
from trainer import session
from trainer.config import TrainConfig
from trainer.engine_in_process import EngineInProcess
from trainer.errors import BadSetting
from trainer.evaluate import EvaluationSettings, evaluate
from trainer.evaluation import PREFIX
from trainer.held_out import read_held_out
from trainer.held_out_metrics import metrics_for


def test_a_run_is_selected_by_a_metric_that_its_evaluation_confirms(
    tmp_path: Path, demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", "sentiment", 24)
    held_out = write_jsonl(tmp_path / "held-out.jsonl", "sentiment", 8)
    config = TrainConfig(
        data=data,
        held_out=held_out,
        output=tmp_path / "run",
        init_text=" The soup was lovely. => positive The soup was cold. => negative",
        num_steps=4,
        evaluate_every=2,
        select_by="accuracy",
        device="cpu",
    )

    result = session.train(
        config, session.Attachments(metrics_for=metrics_for(["accuracy", "token_f1"]))
    )

    log = (result.folder / "log.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, log) if r["kind"] == "held_out"]
    assert [record["step"] for record in records] == [0, 2, 4]
    best = max(record["accuracy"] for record in records)
    [first_best, *_] = [r for r in records if r["accuracy"] == best]
    assert result.best_step == first_best["step"]

    examples, _ = read_held_out(held_out, demo_tokenizer, frozenset({END_OF_TEXT}))
    settings = EvaluationSettings(metrics=("accuracy", "token_f1"))
    found = evaluate(demo_engine, demo_tokenizer, result.prefix.read_bytes(), examples, settings)
    scores = found.conditions[PREFIX].scores
    assert scores["accuracy"].value == best
    assert scores["token_f1"].value == first_best["token_f1"]
    assert scores["loss"].value == pytest.approx(first_best["loss"], abs=1e-4)
    assert found.text_prompt == config.init_text


def test_the_prefix_before_the_first_step_scores_what_its_text_scores(
    tmp_path: Path, demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    """Trainer, artifact and engine agree from end to end: step 0 is the text prompt."""
    data = write_jsonl(tmp_path / "data.jsonl", "record-qa", 8)
    config = TrainConfig(
        data=data,
        held_out=data,
        output=tmp_path / "run",
        init_text=" | food = Greek -- What food does Lomu serve? food = Greek",
        num_steps=1,
        learning_rate=1e-12,
        device="cpu",
    )

    result = session.train(config)

    examples, _ = read_held_out(data, demo_tokenizer, frozenset({END_OF_TEXT}))
    artifact = result.prefix.read_bytes()
    found = evaluate(demo_engine, demo_tokenizer, artifact, examples, EvaluationSettings())
    prefix, text = (found.conditions[name].scores for name in (PREFIX, "text_prompt"))
    assert prefix["loss"].value == pytest.approx(text["loss"].value, abs=1e-5)
    assert prefix["loss"].value == pytest.approx(result.best_loss, abs=1e-4)
    assert prefix["token_f1"] == text["token_f1"]


def test_a_metric_that_is_none_is_refused_before_a_run_begins() -> None:
    with pytest.raises(BadSetting, match="'blue': expected one of"):
        metrics_for(["blue"])
