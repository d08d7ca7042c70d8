"""The build in small: what it trains is what the trainer trains, and what was killed or finished is not lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from demo import MODEL_DIR
from demo.build import base, export, measure, scores, training
from demo.build.full_tuning import fine_tune
from demo.build.tasks import TASKS, Example, Task
from demo.build.tokenizer import load_tokenizer
from prefix_store.artifact import decode
from prefix_store.spec import digest_of
from trainer.encoding import EncodedExample
from trainer.held_out_loss import mean_loss
from trainer.loss import next_token_loss
from trainer.session import gather

NAME = "sentiment"


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    return tmp_path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, two seeds, a few items."""
    monkeypatch.setitem(TASKS, NAME, dataclasses.replace(TASKS[NAME], steps=2))
    for module in (measure, training):
        monkeypatch.setattr(module, "TRAINING_SEEDS", (1, 2))
    monkeypatch.setattr(training, "NUM_TRAIN", 40)
    monkeypatch.setattr(training, "NUM_VALIDATION", 4)
    monkeypatch.setattr(scores, "NUM_TEST", 4)
    monkeypatch.setattr(scores, "MAX_NEW_TOKENS", 4)


def task() -> Task:
    return TASKS[NAME]


def test_a_killed_pretraining_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise Killed

    tokenizer, save = load_tokenizer(MODEL_DIR), base.save_checkpoint
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(base, "CHECKPOINT_SECONDS", -1.0)
        patch.setattr(base, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            base.train_base(tokenizer, tmp_path / "killed", 3)
    resumed = base.train_base(tokenizer, tmp_path / "killed", 3)
    whole = base.train_base(tokenizer, tmp_path / "whole", 3)

    assert base.read_progress(tmp_path / "killed").step == 3
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_base_that_does_not_copy_ends_the_build_even_when_it_is_asked_again(
    tmp_path: Path,
) -> None:
    report = {"validation_loss": 1.0, "copying_accuracy": {"person.name": 0.9, "trip.day": 1.0}}
    base.base_report_path(tmp_path).write_text(json.dumps(report))

    for _ in range(2):
        with pytest.raises(base.GateFailed, match=r"person\.name"):
            base.require_copying(tmp_path)


def test_a_base_that_has_learned_nothing_does_not_copy() -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    torch.manual_seed(0)
    blank = LlamaForCausalLM(base.make_config(0)).eval()

    pairs = list(islice(base.copying_probes("person", "job", 31), 5))

    assert not any(base.copies(blank, tokenizer, context, value) for context, value in pairs)
    able = base.load_base(MODEL_DIR)
    assert all(base.copies(able, tokenizer, context, value) for context, value in pairs)


def test_a_rare_literal_ends_the_build_before_anything_is_trained(
    work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = dataclasses.replace(task(), make=lambda _rng, _split: Example("a =>", "zyzzyva quux", ()))
    monkeypatch.setitem(TASKS, NAME, odd)
    monkeypatch.setattr(scores, "LITERAL_DOCUMENTS", 50)

    with pytest.raises(measure.RareLiteral, match=NAME):
        measure.prepare_task(work_dir, NAME)
    assert not (work_dir / "runs").exists()


def test_a_task_is_trained_measured_and_exported(
    work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "LITERAL_DOCUMENTS", 400)
    monkeypatch.setattr(scores, "LITERAL_MIN_COUNT", 1)

    measure.prepare_task(work_dir, NAME)

    report = export.task_report(work_dir, NAME)
    assert set(report["seeds"]) == {"1", "2"}
    opened = training.open_base(work_dir)
    data = export.in_bf16(opened, work_dir, task())
    prefix = decode(data, digest_of(data))
    assert {tensor.dtype for tensor in (*prefix.keys, *prefix.values)} == {torch.bfloat16}
    assert prefix.manifest.base_model.id == "prefixd-demo-base"
    assert prefix.manifest.training is not None
    assert prefix.manifest.training["seed"] == export.best_seed(report)


def test_a_task_that_is_measured_is_not_measured_again(work_dir: Path) -> None:
    path = measure.report_path(work_dir, NAME)
    path.parent.mkdir()
    path.write_text("{}")

    measure.prepare_task(work_dir, NAME)

    assert path.read_text() == "{}"
    assert not (work_dir / "runs").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(work_dir: Path) -> None:
    config = training.run_config(work_dir, task(), 1)
    config.output.mkdir(parents=True)
    (config.output / "config.json").write_text("{}")
    material = gather(config, training.open_base(work_dir))

    folder = training.train_prefix(work_dir, task(), 1, material)

    assert (folder / "prefix.safetensors").exists()
    trained = (folder / "prefix.safetensors").read_bytes()
    assert training.train_prefix(work_dir, task(), 1, material) == folder
    assert (folder / "prefix.safetensors").read_bytes() == trained
    steps = (folder / "log.jsonl").read_text().count('"kind": "step"')
    assert steps == 2, "a run that has ended takes no further step"


def test_the_shipped_seed_is_chosen_by_the_validation_set_alone() -> None:
    def row(match: float, loss: float, test: float) -> dict[str, object]:
        return {
            "validation": {"exact_match": match},
            "validation_loss": loss,
            "test": {"exact_match": test},
        }

    report = {"seeds": {"1": row(97, 0.1, 100), "2": row(98, 0.2, 90), "3": row(98, 0.1, 80)}}

    assert export.best_seed(report) == 3


def test_test_examples_are_encoded_as_the_trainer_encodes_its_own(work_dir: Path) -> None:
    opened = training.open_base(work_dir)
    material = gather(training.run_config(work_dir, task(), 1), opened)

    assert measure.encode(opened, training.validation_examples(task())) == material.held_out


def test_full_fine_tuning_learns_and_leaves_the_base_frozen_again(work_dir: Path) -> None:
    opened = training.open_base(work_dir)
    data: list[EncodedExample] = measure.encode(opened, training.training_examples(task()))
    before = mean_loss(opened, None, data, 16, next_token_loss)

    fine_tune(opened, data, num_steps=6, seed=1)

    assert mean_loss(opened, None, data, 16, next_token_loss) < before / 2
    assert not any(parameter.requires_grad for parameter in opened.module.parameters())
