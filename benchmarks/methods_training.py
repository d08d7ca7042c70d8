"""One run of `methods`: trained, judged, and kept as JSON, so that what is done is never done again.

    runs/<key>/training.jsonl, held_out.jsonl   what it saw
    runs/<key>/run/                             a prefix's run folder, as `prefixd train` leaves it
    runs/<key>/trained.safetensors              the tensors that the other methods trained
    runs/<key>/training.json                    parameters, bytes, seconds, memory, exact match on the held-out items
    runs/<key>/test.json                        exact match on the test items

Each run has a process of its own with one thread (`methods_runner`), so that its peak of memory is its own.

Everybody is judged by the same loop, `demo.build.decoding`: greedy, 50 rows of like length together. A soft prompt is
judged as the keys and values that it leaves, LoRA merged into the weights; both are exact but for rounding.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.methods_peers import (
    FullTrainee,
    LoraTrainee,
    PeerLoop,
    PromptTrainee,
    Trainee,
    restore,
    state,
)
from benchmarks.methods_plan import PREFIXES, Job, Run
from demo.build.decoding import load_prefix
from demo.build.examples import as_jsonl
from demo.build.scores import evaluate
from demo.build.tasks import TASKS, Example, examples
from demo.build.tokenizer import load_tokenizer
from demo.build.training import DATA_SEED, NUM_TRAIN, VALIDATION_SEED
from trainer.base import FrozenBase, load_base
from trainer.config import TrainConfig
from trainer.errors import Diverged
from trainer.prefix_cache import KeyValues
from trainer.records import Record, read_records
from trainer.run_folder import RunFolder, write_durably
from trainer.session import Attachments, gather, train

TEST_SEED: Final = 9_101
"""Used here and nowhere else; `test` items have names that no text of pretraining has."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where the base is and where results are kept."""

    model_dir: Path
    folder: Path
    num_validation: int

    def of(self, run: Run) -> Path:
        return self.folder / "runs" / run.key

    def training_file(self, run: Run) -> Path:
        return self.of(run) / "training.json"

    def test_file(self, run: Run) -> Path:
        return self.of(run) / "test.json"

    def is_done(self, job: Job) -> bool:
        """Whether nothing of the job is left to do."""
        if not self.training_file(job.run).exists():
            return False
        if job.num_test == 0:
            return True
        test = self.test_file(job.run)
        return test.exists() and bool(read(test)["num_items"] == job.num_test)


def read(path: Path) -> dict[str, Any]:
    """A kept result."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def keep(path: Path, result: Mapping[str, Any]) -> None:
    """Written whole or not at all."""
    write_durably(path, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


def perform(job: Job, place: Workplace) -> str:
    """Does what is not done of the job; its key. Everything that is needed is read from files."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    run = job.run
    if not place.training_file(run).exists():
        shutil.rmtree(place.of(run), ignore_errors=True)  # what a killed process left
        place.of(run).mkdir(parents=True)
        keep(place.training_file(run), _trained(run, place))
    if not place.is_done(job):
        items = examples(TASKS[run.task], TEST_SEED, job.num_test, "test")
        keep(place.test_file(run), judged(run, place, items))
    return job.key


# ---- training --------------------------------------------------------------------------------------


def _trained(run: Run, place: Workplace) -> dict[str, Any]:
    """Trains and leaves the result in the folder; what it took, and how it does on the held-out items."""
    start = _resident_bytes()
    config = settings(run, place)
    figures = _train_prefix(config) if run.method in PREFIXES else _train_peer(run, config, place)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
    items = examples(TASKS[run.task], VALIDATION_SEED, place.num_validation, "train")
    seconds: list[float] = figures.pop("step_seconds")
    return {
        "run": asdict(run),
        **figures,
        "seconds": median(seconds) * run.num_steps,
        "median_step_seconds": median(seconds),
        "peak_bytes": max(peak, 0),
        "held_out": judged(run, place, items),
    }


def settings(run: Run, place: Workplace) -> TrainConfig:
    """The run as the trainer takes it. Writes its data."""
    task, folder = TASKS[run.task], place.of(run)
    everything = examples(task, DATA_SEED, max(run.num_training, NUM_TRAIN), "train")
    training = everything
    if run.num_training < len(everything):  # another part for each seed, as the paper's study has
        training = random.Random(run.seed).sample(everything, run.num_training)
    held_out = examples(task, VALIDATION_SEED, place.num_validation, "train")
    prefix = {"encoder": run.method} if run.method in PREFIXES else {}
    return TrainConfig(
        model=str(place.model_dir),
        dtype="float32",
        device="cpu",
        num_threads=1,
        data=_write(folder / "training.jsonl", training),
        held_out=_write(folder / "held_out.jsonl", held_out),
        output=folder / "run",
        num_virtual_tokens=run.num_virtual_tokens or None,
        init_text=task.init_text,
        learning_rate=run.learning_rate,
        num_steps=run.num_steps,
        seed=run.seed,
        **prefix,
    )


def _write(path: Path, items: Sequence[Example]) -> Path:
    path.write_text(as_jsonl(items), encoding="utf-8")
    return path


class _Clock:
    """CPU seconds of each step of a run: from the record before it to its own. Behind an evaluation a checkpoint is in it too."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self._since: float | None = None

    def on_record(self, record: Record) -> None:
        now = time.process_time()
        if record["kind"] == "step" and self._since is not None:
            self.step_seconds.append(now - self._since)
        self._since = now


def _train_prefix(config: TrainConfig) -> dict[str, Any]:
    """By `prefixd train` as a library. A run that diverged counts with its best prefix."""
    diverged, clock = False, _Clock()
    try:
        train(config, Attachments(observers=[clock]))
    except Diverged:
        diverged = True
    folder = RunFolder(config.output)
    records = read_records(folder.log)
    [begin] = [r for r in records if r["kind"] == "begin"]
    best = min((r for r in records if r["kind"] == "held_out"), key=lambda r: float(r["loss"]))
    return {
        "num_trained": begin["num_parameters"],
        "num_stored": load_prefix(folder.prefix).numel(),
        "stored_bytes": folder.prefix.stat().st_size,
        "best_step": best["step"],
        "held_out_loss": best["loss"],
        "diverged": diverged,
        "step_seconds": clock.step_seconds,
    }


def _train_peer(run: Run, config: TrainConfig, place: Workplace) -> dict[str, Any]:
    material = gather(config)
    trainee = trainee_of(run, material.base)
    loop = PeerLoop(material.base, trainee, config, material.training, material.held_out)
    loop.run()
    path = place.of(run) / "trained.safetensors"
    tensors = state(trainee)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    count = sum(tensor.numel() for tensor in tensors.values())
    return {
        "num_trained": count,
        "num_stored": count,
        "stored_bytes": path.stat().st_size,
        "best_step": loop.best_step,
        "held_out_loss": loop.best_loss,
        "diverged": loop.diverged_step is not None,
        "step_seconds": loop.step_seconds,
    }


def trainee_of(run: Run, base: FrozenBase) -> Trainee:
    """What a method other than ours trains on this base."""
    match run.method:
        case "full":
            return FullTrainee(base)
        case "lora":
            return LoraTrainee(base, run.seed)
        case "prompt":
            text = TASKS[run.task].init_text
            return PromptTrainee(base, text, run.num_virtual_tokens, run.seed)
        case "direct" | "mlp":
            raise AssertionError("prefixes are trained by the trainer")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# ---- judging ---------------------------------------------------------------------------------------


def judged(run: Run, place: Workplace, items: Sequence[Example]) -> dict[str, Any]:
    """Exact match in percent of what the stored result answers; only the leading space is forgiven."""
    started = time.perf_counter()
    module, prefix = load_trained(run, place)
    tokenizer = load_tokenizer(place.model_dir)
    return {
        "exact_match": evaluate(module, tokenizer, items, prefix).exact_match,
        "num_items": len(items),
        "seconds": time.perf_counter() - started,
    }


def load_trained(run: Run, place: Workplace) -> tuple[Any, Tensor | None]:
    """A transformers model, and the prefix [L, 2, P, H, D] that stands before each of its rows, if any."""
    base = load_base(str(place.model_dir), dtype="float32", device="cpu")
    if run.method in PREFIXES:
        return base.module, load_prefix(RunFolder(place.of(run) / "run").prefix)
    trainee = trainee_of(run, base)
    restore(trainee, load_file(place.of(run) / "trained.safetensors"))
    key_values = trainee.prefix()
    return trainee.finish(), None if key_values is None else stacked(key_values)


def stacked(key_values: KeyValues) -> Tensor:
    """[L, 2, P, H, D], as `demo.build.decoding` has prefixes."""
    pairs = zip(key_values.keys, key_values.values, strict=True)
    return torch.stack([torch.stack(pair) for pair in pairs])
