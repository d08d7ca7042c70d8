"""From the work directory to the files that are shipped: model, prefixes, scores, samples.

Called by ``python -m demo.build export`` and ``... scores``. Prefix files are written by
``prefix_store``, so that what the demo ships is what the server accepts.
"""

import json
import logging
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from demo import BASE_MODEL_ID, MODEL_DIR, PREFIXES_DIR, SAMPLES_FILE, SCORES_FILE, Sample
from demo.build import prefixes, scores
from demo.build.base import load_base
from demo.build.decoding import TENSOR_NAME, complete, load_prefix, probe_of
from demo.build.tasks import TASKS, Task, examples
from demo.build.tokenizer import encode, load_tokenizer
from prefix_store.artifact import save
from prefix_store.fingerprint import base_model_ref
from prefix_store.spec import GenerationDefaults, PrefixManifest

log = logging.getLogger(__name__)


BF16_MAX_LOSS: Final = 0.5
READABLE: Final = 0o644


def raw_path(work_dir: Path, task: str) -> Path:
    return work_dir / "prefixes" / f"{task}.safetensors"


def save_raw(work_dir: Path, task: str, trained: prefixes.TrainedPrefix) -> None:
    """Keep the trained tensor in full precision, with its training record beside it."""
    path = raw_path(work_dir, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"prefix": trained.prefix.contiguous()}, path)
    record = asdict(trained)
    del record["prefix"]
    path.with_suffix(".json").write_text(json.dumps(record))


def validation_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, prefix: torch.Tensor
) -> float:
    """Exact match on the validation set: what every choice is made by."""
    data = examples(task, prefixes.VALIDATION_SEED, prefixes.NUM_VALIDATION, "train")
    return scores.evaluate(model, tokenizer, data, prefix).exact_match


def training_record(task: Task, record: dict[str, float], validation: float) -> dict[str, Any]:
    return {
        "method": "prefix-tuning, MLP reparameterization folded away",
        "init_text": task.init_text,
        "mlp": {"embedding": prefixes.EMBEDDING, "hidden": prefixes.HIDDEN},
        "optimizer": "AdamW (0.9, 0.98), 6 % warm-up, cosine",
        "learning_rate": prefixes.LEARNING_RATE,
        "steps": task.steps,
        "batch": prefixes.BATCH,
        "examples": prefixes.NUM_TRAIN,
        "seed": prefixes.TRAIN_SEED,
        "seconds": round(record["seconds"], 1),
        "validation": {
            "exact_match": validation,
            "loss_per_token": round(record["validation_loss"], 5),
            "first_token_probability": round(record["first_token_probability"], 5),
        },
    }


def artifact_tensors(prefix: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[L, 2, P, H, D]`` as the artifact's per-layer tensors."""
    return {
        TENSOR_NAME.format(layer=layer, kind=kind): prefix[layer, index].contiguous()
        for layer in range(prefix.shape[0])
        for index, kind in enumerate(("k", "v"))
    }


def sample_ids(tokenizer: PreTrainedTokenizerBase, task: Task) -> list[int]:
    """The tokens of the first validation prompt."""
    [item] = examples(task, prefixes.VALIDATION_SEED, 1, "train")
    return encode(tokenizer, item.prompt)


def export_prefix(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, work_dir: Path
) -> None:
    """Write one artifact, in bf16 unless that costs more than half a point on validation."""
    path = raw_path(work_dir, task.name)
    prefix = load_file(path)["prefix"]
    full = validation_match(model, tokenizer, task, prefix)
    rounded = validation_match(model, tokenizer, task, prefix.bfloat16().float())
    small = full - rounded <= BF16_MAX_LOSS
    record = json.loads(path.with_suffix(".json").read_text())
    dtype = torch.bfloat16 if small else torch.float32
    stored = prefix.to(dtype)
    manifest = PrefixManifest(
        num_virtual_tokens=prefix.shape[2],
        token_start=prefix.shape[2],
        k_space="post_rope",
        model_type=model.config.model_type,
        rope_theta=float(model.config.rope_parameters["rope_theta"]),
        base_model=base_model_ref(model, tokenizer, model_id=BASE_MODEL_ID),
        probe=probe_of(model, stored.float(), sample_ids(tokenizer, task)),
        generation=GenerationDefaults(max_tokens=scores.MAX_NEW_TOKENS, temperature=0.0),
        description=task.description,
        training=training_record(task, record, rounded if small else full),
    )
    PREFIXES_DIR.mkdir(exist_ok=True)
    save(PREFIXES_DIR / f"{task.name}.safetensors", artifact_tensors(stored), manifest)
    log.info("%s validation fp32 %.1f bf16 %.1f, stored as %s", task.name, full, rounded, dtype)


def export_all(work_dir: Path) -> None:
    """Copy the base and write every prefix that has been trained."""
    shutil.copytree(work_dir / "model", MODEL_DIR, dirs_exist_ok=True)
    for file in MODEL_DIR.iterdir():
        file.chmod(READABLE)  # safetensors writes for the owner only; a server runs as another user
    model, tokenizer = load_base(MODEL_DIR), load_tokenizer(MODEL_DIR)
    for task in TASKS.values():
        export_prefix(model, tokenizer, task, work_dir)


def load_prefixes() -> dict[str, torch.Tensor]:
    """The shipped prefixes by task, in the order of ``TASKS``."""
    return {name: load_prefix(PREFIXES_DIR / f"{name}.safetensors") for name in TASKS}


def make_sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, prefix: torch.Tensor
) -> Sample:
    """The first validation item that the prefix answers as it should."""
    for item in examples(task, prefixes.VALIDATION_SEED, prefixes.NUM_VALIDATION, "train"):
        [text] = complete(model, tokenizer, [item.prompt], prefix, scores.MAX_NEW_TOKENS)
        if text.removeprefix(" ") == item.answer:
            return Sample(task.name, item.prompt, text, scores.MAX_NEW_TOKENS)
    raise RuntimeError(f"{task.name}: no validation item is answered right")


def write_scores(work_dir: Path) -> dict[str, Any]:
    """Measure the shipped files on the test sets; write ``scores.json`` and ``samples.json``."""
    model, tokenizer = load_base(MODEL_DIR), load_tokenizer(MODEL_DIR)
    loaded = load_prefixes()
    samples = [asdict(make_sample(model, tokenizer, TASKS[n], p)) for n, p in loaded.items()]
    SAMPLES_FILE.write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n")
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "num_virtual_tokens": prefixes.NUM_VIRTUAL_TOKENS,
        "num_test": scores.NUM_TEST,
        "seeds": {
            "train": prefixes.TRAIN_SEED,
            "validation": prefixes.VALIDATION_SEED,
            "test": scores.TEST_SEED,
        },
        "base": json.loads((work_dir / "base-report.json").read_text()),
        "tasks": {
            name: scores.task_scores(model, tokenizer, TASKS[name], prefix)
            for name, prefix in loaded.items()
        },
        "wrong_task_exact_match": scores.wrong_task_matrix(model, tokenizer, loaded),
    }
    SCORES_FILE.write_text(json.dumps(report, indent=2) + "\n")
    return report
