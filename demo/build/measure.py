"""One task, trained and measured: its prefix with every seed, full fine-tuning, the base alone and with solved examples.

Called by ``python -m demo.build tasks`` in a process a core, one task at a time. Everything about a task goes to
``tasks/<task>.json`` in the work directory; a task that has its file is not measured again.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from demo.build.base import load_base
from demo.build.decoding import load_prefix
from demo.build.full_tuning import fine_tune
from demo.build.scores import evaluate, few_shot_score, rare_literals, test_examples
from demo.build.tasks import TASKS, Example, Task
from demo.build.tokenizer import load_tokenizer
from demo.build.training import (
    TRAINING_SEEDS,
    open_base,
    run_config,
    train_prefix,
    validation_examples,
)
from trainer.base import FrozenBase
from trainer.data import Example as TrainerExample
from trainer.encoding import EncodedExample, EncodingSettings, ExampleEncoder
from trainer.held_out_loss import mean_loss
from trainer.loss import next_token_loss
from trainer.prefix_cache import KeyValues
from trainer.session import Material, gather

log = logging.getLogger(__name__)

ROWS_AT_ONCE: Final = 16


class RareLiteral(RuntimeError):
    """A task asks for a word that the corpus hardly holds: a tiny frozen model cannot be steered to it."""


def report_path(work_dir: Path, task: str) -> Path:
    return work_dir / "tasks" / f"{task}.json"


def prepare_task(work_dir: Path, name: str) -> None:
    """Trains and measures one task, unless that was done. Raises `RareLiteral`."""
    path = report_path(work_dir, name)
    if path.exists():
        return
    task, model, tokenizer = (
        TASKS[name],
        load_base(work_dir / "model"),
        load_tokenizer(work_dir / "model"),
    )
    if rare := rare_literals(tokenizer, task):
        raise RareLiteral(f"{name}: the corpus hardly holds {rare}")
    base = open_base(work_dir)
    material = gather(run_config(work_dir, task, TRAINING_SEEDS[0]), base)
    test = test_examples(task)
    report = {
        "seeds": {
            str(seed): _one_seed(work_dir, task, seed, material, model, tokenizer)
            for seed in TRAINING_SEEDS
        },
        "base": asdict(evaluate(model, tokenizer, test, None)),
        "base_few_shot": asdict(few_shot_score(model, tokenizer, task, test)),
        "full_fine_tuning": _fully_tuned(work_dir, task, material, tokenizer),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=2))
    log.info("%s is measured", name)


def _one_seed(
    work_dir: Path,
    task: Task,
    seed: int,
    material: Material,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """One trained prefix: exact match and loss on the validation set and on the test set."""
    folder = train_prefix(work_dir, task, seed, material)
    prefix = load_prefix(folder / "prefix.safetensors")
    validation, test = validation_examples(task), test_examples(task)
    found = {
        "validation": asdict(evaluate(model, tokenizer, validation, prefix)),
        "validation_loss": round(_loss(material.base, prefix, validation), 5),
        "test": asdict(evaluate(model, tokenizer, test, prefix)),
        "test_loss": round(_loss(material.base, prefix, test), 5),
    }
    log.info("%s seed %d, validation: %s", task.name, seed, found["validation"])
    return found


def _fully_tuned(
    work_dir: Path, task: Task, material: Material, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The same data, every parameter of a base of its own."""
    base = open_base(work_dir)
    fine_tune(base, material.training, seed=TRAINING_SEEDS[0])
    return {"test": asdict(evaluate(base.module, tokenizer, test_examples(task), None))}


def _loss(base: FrozenBase, prefix: torch.Tensor, data: Sequence[Example]) -> float:
    """Teacher-forced, nats a completion token. ``prefix`` [L, 2, P, H, D]."""
    keys_values = KeyValues(tuple(prefix[:, 0]), tuple(prefix[:, 1]))
    return mean_loss(base, keys_values, encode(base, data), ROWS_AT_ONCE, next_token_loss)


def encode(base: FrozenBase, data: Sequence[Example]) -> list[EncodedExample]:
    """The examples' tokens, as the trainer has them."""
    encoder = ExampleEncoder(base.tokenizer, EncodingSettings(" ", base.model.eos_token_ids))
    items = [TrainerExample(item.prompt, item.answer, line) for line, item in enumerate(data, 1)]
    return encoder.encode(items)[0]
