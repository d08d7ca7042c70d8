"""From the work directory to the files that are shipped: model, prefixes, samples, scores and their tables.

Called by ``python -m demo.build export`` and ``... scores``. The shipped prefix of a task is the seed that answers most
of the validation set, in bf16.
"""

import json
import logging
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from demo import DEMO_DIR, MODEL_DIR, PREFIXES_DIR, SAMPLES_FILE, SCORES_FILE, Sample
from demo.build import scores, training
from demo.build.base import load_base
from demo.build.decoding import complete, load_prefix
from demo.build.measure import report_path
from demo.build.parallel import over_tasks
from demo.build.tables import insert_tables
from demo.build.targets import TargetsMissed, missed
from demo.build.tasks import TASKS, Task
from demo.build.tokenizer import load_tokenizer
from prefix_store.artifact import decode
from prefix_store.spec import digest_of
from trainer.base import FrozenBase
from trainer.export import Export
from trainer.prefix_cache import KeyValues

log = logging.getLogger(__name__)

READABLE: Final = 0o644
README_FILE: Final = DEMO_DIR / "README.md"


def task_report(work_dir: Path, task: str) -> dict[str, Any]:
    """What ``measure`` has found."""
    found: dict[str, Any] = json.loads(report_path(work_dir, task).read_text())
    return found


def best_seed(report: dict[str, Any]) -> int:
    """By the validation set: most right, then least loss."""

    def rank(seed: str) -> tuple[float, float]:
        row = report["seeds"][seed]
        return -row["validation"]["exact_match"], row["validation_loss"]

    return int(min(report["seeds"], key=rank))


def run_prefix(work_dir: Path, task: str) -> Path:
    """The fp32 artifact of the best seed."""
    seed = best_seed(task_report(work_dir, task))
    return work_dir / "runs" / f"{task}-seed{seed}" / "prefix.safetensors"


def in_bf16(base: FrozenBase, work_dir: Path, task: Task) -> bytes:
    """The best seed's artifact with its tensors in bf16, its probe made anew."""
    data = run_prefix(work_dir, task.name).read_bytes()
    prefix = decode(data, digest_of(data))
    generation, probe = prefix.manifest.generation, prefix.manifest.probe
    assert generation.max_tokens is not None, "the trainer names one"
    assert probe is not None, "the trainer makes one"
    config = training.run_config(work_dir, task, best_seed(task_report(work_dir, task.name)))
    config = config.model_copy(update={"artifact_dtype": "bfloat16"})
    export = Export(base, config, generation.max_tokens, probe.input_ids)
    return export.artifact(KeyValues(prefix.keys, prefix.values), prefix.manifest.training or {})


def export_all(work_dir: Path) -> None:
    """Copies the base and writes each task's prefix."""
    shutil.copytree(work_dir / "model", MODEL_DIR, dirs_exist_ok=True)
    for file in MODEL_DIR.iterdir():
        file.chmod(READABLE)  # safetensors writes for the owner only; a server runs as another user
    base = training.open_base(work_dir)
    PREFIXES_DIR.mkdir(exist_ok=True)
    for task in TASKS.values():
        data = in_bf16(base, work_dir, task)
        (PREFIXES_DIR / f"{task.name}.safetensors").write_bytes(data)
        log.info("%s: %d bytes", task.name, len(data))


def make_sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, prefix: torch.Tensor
) -> Sample:
    """The first validation item that the prefix answers as it should."""
    for item in training.validation_examples(task):
        [text] = complete(model, tokenizer, [item.prompt], prefix, scores.MAX_NEW_TOKENS)
        if text.removeprefix(" ") == item.answer:
            return Sample(task.name, item.prompt, text, scores.MAX_NEW_TOKENS)
    raise TargetsMissed(f"{task.name}: no validation item is answered right")


def shipped_path(work_dir: Path, task: str) -> Path:
    return work_dir / "shipped" / f"{task}.json"


def measure_shipped(work_dir: Path, name: str) -> None:
    """The shipped prefix of one task: what bf16 costs it, what it does to other tasks' items, and one sample."""
    model, tokenizer = load_base(MODEL_DIR), load_tokenizer(MODEL_DIR)
    task, prefix = TASKS[name], load_prefix(PREFIXES_DIR / f"{name}.safetensors")
    full = load_prefix(run_prefix(work_dir, name))
    test = scores.test_examples(task)

    def match(tensors: torch.Tensor) -> float:
        return scores.evaluate(model, tokenizer, test, tensors).exact_match

    found: dict[str, Any] = {
        "sample": asdict(make_sample(model, tokenizer, task, prefix)),
        "wrong_task": scores.wrong_task_row(model, tokenizer, prefix),
        "shipped": {"float32": match(full), "stored_bf16": match(prefix)},
    }
    model.to(torch.bfloat16)
    found["shipped"]["served_bf16"] = match(prefix.bfloat16())
    path = shipped_path(work_dir, name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found))


def write_scores(work_dir: Path) -> dict[str, Any]:
    """Measures the shipped files; writes samples, scores and the README's tables. Raises `TargetsMissed` after that."""
    over_tasks(measure_shipped, work_dir)
    shipped = {name: json.loads(shipped_path(work_dir, name).read_text()) for name in TASKS}
    samples = [found["sample"] for found in shipped.values()]
    SAMPLES_FILE.write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n")
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "num_test": scores.NUM_TEST,
        "num_wrong_task": scores.NUM_WRONG_TASK,
        "seeds": {
            "data": training.DATA_SEED,
            "validation": training.VALIDATION_SEED,
            "test": scores.TEST_SEED,
            "training": training.TRAINING_SEEDS,
        },
        "base": json.loads((work_dir / "base-report.json").read_text()),
        "tasks": {name: _task_scores(work_dir, name, shipped[name]["shipped"]) for name in TASKS},
        "wrong_task_exact_match": {name: found["wrong_task"] for name, found in shipped.items()},
    }
    SCORES_FILE.write_text(json.dumps(report, indent=2) + "\n")
    insert_tables(README_FILE, report)
    if misses := missed(report):
        raise TargetsMissed("\n".join(misses))
    return report


def _task_scores(work_dir: Path, name: str, shipped: dict[str, float]) -> dict[str, Any]:
    report = task_report(work_dir, name)
    return {
        "num_virtual_tokens": TASKS[name].num_virtual_tokens,
        "steps": TASKS[name].steps,
        **report,
        "shipped": {"seed": best_seed(report), **shipped},
    }
