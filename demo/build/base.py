"""Pretraining of the demo's base model, and the copying gate that it has to pass.

Called by ``python -m demo.build base``. Plain float32: on the processors tried it was 1.8 times as fast as
bfloat16 under autocast, and it gives the same weights again on the same kind of machine. A checkpoint in the
work directory is rewritten every few minutes; after a kill the run goes on as if it had not been killed.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from demo.build.corpus import SEPARATORS, documents
from demo.build.grammar import NOTATIONS, SUBJECT_KEY, VERB_PHRASES, describe
from demo.build.tokenizer import MAX_POSITIONS, VOCAB_SIZE, encode
from demo.build.vocabulary import FIELDS, make_record, seeded

log = logging.getLogger(__name__)

ROW_TOKENS: Final = 256
ROWS_PER_STEP: Final = 8
NUM_STEPS: Final = 4_000
PEAK_LR: Final = 3e-3
WARMUP_STEPS: Final = 100
DECAY_FROM: Final = 0.55
CHECKPOINT_SECONDS: Final = 150.0
LOG_STEPS: Final = 100
DOCUMENTS_PER_CHUNK: Final = 4_000
TRAIN_SEED: Final = 1_000_000
VALIDATION_SEED: Final = 21
VALIDATION_ROWS: Final = 64
GATE_SEED: Final = 31
GATE_PROBES: Final = 40
GATE_ACCURACY: Final = 0.95
IGNORED: Final = -100


def make_config(eos_token_id: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )


def rows(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[list[int]]:
    """Rows of whole documents, each closed by EOS; only a row's last document may be cut."""
    eos = tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token))
    row: list[int] = []
    stream = documents(seed)
    while chunk := list(islice(stream, DOCUMENTS_PER_CHUNK)):
        for ids in tokenizer(chunk)["input_ids"]:
            row += [*ids, eos]
            if len(row) >= ROW_TOKENS:
                yield row[:ROW_TOKENS]
                row = []


def batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, num_rows: int = ROWS_PER_STEP
) -> Iterator[torch.Tensor]:
    """Endless [num_rows, ROW_TOKENS] batches of fresh text."""
    source = rows(tokenizer, seed)
    while True:
        yield torch.tensor(list(islice(source, num_rows)))


def learning_rate(step: int, num_steps: int) -> float:
    """Warm-up, then flat, then linear to zero."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = 1.0 - step / num_steps
    return PEAK_LR * min(warm, left / (1.0 - DECAY_FROM))


@dataclass(slots=True)
class Progress:
    """What a resumed run has to know beside the tensors."""

    step: int = 0
    elapsed_seconds: float = 0.0


def parameter_groups(model: LlamaForCausalLM) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]


def save_checkpoint(
    work_dir: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Weights, AdamW moments and progress in one safetensors file, replaced atomically."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
    record = {
        "step": progress.step,
        "elapsed_seconds": progress.elapsed_seconds,
    }
    fresh = work_dir / "base.tmp"
    save_file(tensors, fresh, metadata={"progress": json.dumps(record)})
    fresh.replace(checkpoint_path(work_dir))


def load_checkpoint(
    work_dir: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer
) -> Progress:
    """Restore the last checkpoint, or say that the run starts from nothing."""
    path = checkpoint_path(work_dir)
    if not path.exists():
        return Progress()
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, field = key.split(".", 2)
            moments.setdefault(int(index), {})[field] = value
    state = optimizer.state_dict()
    optimizer.load_state_dict(state | {"state": moments})
    return read_progress(work_dir)


def checkpoint_path(work_dir: Path) -> Path:
    return work_dir / "base.safetensors"


def read_progress(work_dir: Path) -> Progress:
    """That of the last checkpoint."""
    with safe_open(checkpoint_path(work_dir), "pt") as file:
        record = json.loads(file.metadata()["progress"])
    return Progress(record["step"], record["elapsed_seconds"])


def train_base(
    tokenizer: PreTrainedTokenizerBase, work_dir: Path, num_steps: int
) -> LlamaForCausalLM:
    """Train for ``num_steps`` in all, over however many restarts."""
    torch.manual_seed(0)
    eos = tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token))
    model = LlamaForCausalLM(make_config(eos))
    optimizer = torch.optim.AdamW(
        parameter_groups(model), lr=PEAK_LR, betas=(0.9, 0.95), fused=True
    )
    progress = load_checkpoint(work_dir, model, optimizer)
    source = islice(batches(tokenizer, TRAIN_SEED), progress.step, num_steps)
    saved = last = time.monotonic()
    started = last - progress.elapsed_seconds
    recent: list[float] = []
    for batch in source:
        rate = learning_rate(progress.step, num_steps)
        recent.append(train_step(model, optimizer, batch, rate))
        progress.step += 1
        now = time.monotonic()
        progress.elapsed_seconds = now - started
        if progress.step % LOG_STEPS == 0:
            log_progress(progress, num_steps, recent, len(recent) / (now - last), rate)
            last, recent = now, []
        if now - saved > CHECKPOINT_SECONDS:
            save_checkpoint(work_dir, model, optimizer, progress)
            saved = now
    save_checkpoint(work_dir, model, optimizer, progress)
    return model


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor, rate: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def log_progress(
    progress: Progress, num_steps: int, losses: list[float], steps_per_second: float, rate: float
) -> None:
    tokens = progress.step * ROWS_PER_STEP * ROW_TOKENS
    log.info(
        "step %d  loss %.3f  lr %.2e  %.2f M tokens  %.0f tokens/s  %.1f min left",
        progress.step,
        sum(losses) / len(losses),
        rate,
        tokens / 1e6,
        steps_per_second * ROWS_PER_STEP * ROW_TOKENS,
        (num_steps - progress.step) / steps_per_second / 60.0,
    )


@torch.inference_mode()
def validation_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> float:
    source = batches(tokenizer, VALIDATION_SEED)
    count = VALIDATION_ROWS // ROWS_PER_STEP
    losses = [model(input_ids=b, labels=b, use_cache=False).loss for b in islice(source, count)]
    return float(torch.stack(losses).mean())


def sentence_lead(domain: str, key: str) -> str:
    """The start of a sentence after which only the value of ``key`` can follow."""
    if key == "price":  # "is" and "has" could go on in other ways
        return "The {kind} {name} serves {food} food at"
    leads = [phrase.split("{")[0] for phrase in VERB_PHRASES[domain]["plain"][key]]
    return "{" + SUBJECT_KEY[domain] + "} " + max(leads, key=len)


def copying_probes(domain: str, key: str, seed: int) -> Iterator[tuple[str, str]]:
    """(context, value) pairs where the context alone decides that the value must follow.

    In turn: record to record, record to sentence, sentence to record.
    """
    rng = seeded(seed)
    subject = SUBJECT_KEY[domain]
    ways = 3 if key != subject else 1
    for index in range(GATE_PROBES):
        record = make_record(domain, rng, "train", min_fields=len(FIELDS[domain]))
        before = NOTATIONS[index % len(NOTATIONS)](list(record.items()))
        after = f"{subject} = {record[subject]} | {key} =" if key != subject else f"{key} ="
        way = index % ways
        if way == 1:
            after = sentence_lead(domain, key).format_map(record)
        if way == 2:
            before = describe(domain, record, "plain", rng)
        yield before + rng.choice(SEPARATORS) + after.strip(), record[key]


@torch.inference_mode()
def copies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, context: str, value: str
) -> bool:
    """Whether greedy decoding would write all tokens of the value."""
    left, right = encode(tokenizer, context), encode(tokenizer, value)
    logits = model(input_ids=torch.tensor([left + right]), use_cache=False).logits[0]
    guessed: list[int] = logits[len(left) - 1 : -1].argmax(-1).tolist()
    return guessed == right


def copying_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Share of probes copied, per ``domain.field``."""
    accuracy = {}
    for domain, fields in FIELDS.items():
        for number, key in enumerate(fields):
            probes = list(copying_probes(domain, key, GATE_SEED + number))
            hits = sum(copies(model, tokenizer, context, value) for context, value in probes)
            accuracy[f"{domain}.{key}"] = hits / len(probes)
    return accuracy


class GateFailed(RuntimeError):
    """The base does not copy well enough for a prefix to build on it."""


def finish_base(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, work_dir: Path
) -> None:
    """Export, measure what was exported, write the report."""
    model_dir = work_dir / "model"
    export_base(model.eval(), tokenizer, model_dir)
    stored = load_base(model_dir)
    run = read_progress(work_dir)
    report = {
        "parameters": stored.num_parameters(),
        "steps": run.step,
        "tokens": run.step * ROWS_PER_STEP * ROW_TOKENS,
        "minutes": round(run.elapsed_seconds / 60.0, 1),
        "validation_loss": round(validation_loss(stored, tokenizer), 4),
        "copying_accuracy": copying_accuracy(stored, tokenizer),
    }
    base_report_path(work_dir).write_text(json.dumps(report, indent=2))


def base_report_path(work_dir: Path) -> Path:
    return work_dir / "base-report.json"


def require_copying(work_dir: Path) -> None:
    """Raises `GateFailed` unless the report says that the base copies every field."""
    report = json.loads(base_report_path(work_dir).read_text())
    accuracy: dict[str, float] = report["copying_accuracy"]
    log.info(
        "validation loss %.3f, worst copying %.3f",
        report["validation_loss"],
        min(accuracy.values()),
    )
    weak = {field: share for field, share in accuracy.items() if share < GATE_ACCURACY}
    if weak:
        raise GateFailed(f"copying below {GATE_ACCURACY}: {weak}")


def export_base(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, model_dir: Path
) -> None:
    """Write the model in bf16 with a generation config that knows the end of text."""
    eos = tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token))
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos, do_sample=False)
    model.to(torch.bfloat16).save_pretrained(model_dir)
    model.to(torch.float32)
    tokenizer.save_pretrained(model_dir)


def load_base(model_dir: Path) -> LlamaForCausalLM:
    """The stored base, computed in fp32, frozen."""
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return model.eval().requires_grad_(False)
