"""The prefixes of the demo's tasks, trained by ``trainer`` as a user trains one: files of examples in, a run folder out.

Called by ``measure`` for each task and seed. A run that was killed goes on from its checkpoint, one that has ended is
left as it is. Every choice is made on the validation set, whose names pretraining has used; test names occur here nowhere.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from demo import BASE_MODEL_ID
from demo.build.examples import as_jsonl
from demo.build.tasks import Example, Task, examples
from server.engine.tokenizer import Tokenizer
from server.model.loader import load_model
from trainer import session
from trainer.base import FrozenBase, adopt_base
from trainer.config import TrainConfig
from trainer.records import Record
from trainer.run_folder import RunFolder

log = logging.getLogger(__name__)

DATA_SEED: Final = 41
VALIDATION_SEED: Final = 42
NUM_TRAIN: Final = 2_000
NUM_VALIDATION: Final = 100
TRAINING_SEEDS: Final = (1, 2, 3)


def training_examples(task: Task) -> list[Example]:
    """What every method learns from."""
    return examples(task, DATA_SEED, NUM_TRAIN, "train")


def validation_examples(task: Task) -> list[Example]:
    """What every choice is made by."""
    return examples(task, VALIDATION_SEED, NUM_VALIDATION, "train")


def open_base(work_dir: Path) -> FrozenBase:
    """The base of this work directory under the name that the shipped one has, in fp32 on the CPU."""
    model_dir = work_dir / "model"
    device = torch.device("cpu")
    model = load_model(model_dir, device=device, dtype="float32", model_id=BASE_MODEL_ID)
    return adopt_base(model, Tokenizer.load(model_dir))


def run_config(work_dir: Path, task: Task, seed: int) -> TrainConfig:
    """One run: the trainer's defaults, the task's text and steps. Writes the data files."""
    data_dir = work_dir / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    files = {"train": training_examples(task), "validation": validation_examples(task)}
    for name, data in files.items():
        path = data_dir / f"{task.name}.{name}.jsonl"
        path.write_text(as_jsonl(data), encoding="utf-8")
    return TrainConfig(
        model=str(work_dir / "model"),
        dtype="float32",
        device="cpu",
        data=data_dir / f"{task.name}.train.jsonl",
        held_out=data_dir / f"{task.name}.validation.jsonl",
        output=work_dir / "runs" / f"{task.name}-seed{seed}",
        init_text=task.init_text,
        num_virtual_tokens=task.num_virtual_tokens,
        num_steps=task.steps,
        evaluate_every=max(1, task.steps // 4),
        seed=seed,
        description=task.description,
    )


@dataclass(frozen=True, slots=True)
class _Told:
    """Writes a run's evaluations to the log."""

    title: str

    def on_record(self, record: Record) -> None:
        if record["kind"] == "held_out":
            log.info("%s  step %d  loss %.4f", self.title, record["step"], record["loss"])
        if record["kind"] == "warning":
            log.warning("%s  %s", self.title, record["message"])


def train_prefix(work_dir: Path, task: Task, seed: int, material: session.Material) -> Path:
    """The folder of the finished run. ``material``: what ``session.gather`` gave for this task."""
    config = run_config(work_dir, task, seed)
    attachments = session.Attachments(observers=[_Told(f"{task.name} seed {seed}")])
    if RunFolder(config.output).checkpoint.exists():
        return session.resume(config.output, attachments, material).folder
    shutil.rmtree(config.output, ignore_errors=True)  # killed before its first checkpoint
    return session.train(config, attachments, material).folder
