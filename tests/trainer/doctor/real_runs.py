"""Short real runs on the demo model, sane ones and ones that are spoilt in the way a test wants."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from demo.build.tasks import TASKS, examples
from trainer import session
from trainer.base import FrozenBase
from trainer.batches import make_batch
from trainer.conclusion import RecordedRun
from trainer.config import TrainConfig
from trainer.encoding import EncodedExample
from trainer.errors import Diverged
from trainer.export import Export
from trainer.initial import InitialPrefix, initial_prefix
from trainer.loop import HeldOutMetrics
from trainer.prefix_cache import KeyValues


def write_task(path: Path, task: str, seed: int, count: int, *, shuffled: bool = False) -> Path:
    """JSONL of a demo task; `shuffled`: each completion beside another example's prompt."""
    rows = [
        {"prompt": e.prompt, "completion": e.answer}
        for e in examples(TASKS[task], seed, count, "train")
    ]
    if shuffled:
        completions = [row["completion"] for row in rows]
        random.Random(1).shuffle(completions)
        rows = [row | {"completion": c} for row, c in zip(rows, completions, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    folder: Path,
    task: str = "record-qa",
    *,
    count: int = 300,
    shuffled: bool = False,
    metrics_for: session.MetricsFor | None = None,
    **settings: Any,
) -> RecordedRun:
    """Trains as long as it goes; a run that diverges has records too."""
    defaults: dict[str, Any] = {
        "data": write_task(folder / "data.jsonl", task, 5, count, shuffled=shuffled),
        "output": folder / "run",
        "held_out": write_task(folder / "held_out.jsonl", task, 6, 32, shuffled=shuffled),
        "device": "cpu",
        "encoder": "mlp",
        "num_virtual_tokens": 16,
        "init_text": TASKS[task].init_text,
        "num_steps": 60,
        "batch_size": 8,
    }
    config = TrainConfig(**(defaults | settings))
    with contextlib.suppress(Diverged):
        session.train(config, session.Attachments(metrics_for=metrics_for))
    return RecordedRun.read(config.output)


def names(run: RecordedRun) -> list[str]:
    return [finding.name.value for finding in run.findings()]


def told(run: RecordedRun) -> str:
    """For the message of a test that fails."""
    return "\n".join(f"{f.name} ({f.severity.name}): {f.evidence}" for f in run.findings())


# ---- prefixes and metrics that spoil a run ----------------------------------------------------------


def aimed(
    base: FrozenBase, start: KeyValues, data: Sequence[EncodedExample], factor: float, count: int
) -> KeyValues:
    """`start`, the keys of its first `count` rows made `factor` times the mean query's direction in their layer.

    Far along it they take all attention of the completion tokens, far against it they get none.
    """
    keys = [tensor.clone() for tensor in start.keys]
    for layer, query in enumerate(_mean_queries(base, start.num_virtual_tokens, data)):
        keys[layer][:count] = factor * query / query.norm(dim=-1, keepdim=True)
    return KeyValues(tuple(keys), start.values)


@torch.no_grad()
def _mean_queries(base: FrozenBase, start: int, data: Sequence[EncodedExample]) -> list[Tensor]:
    """Per layer [H_kv, D]: over the completion tokens, and the query heads that share a key head."""
    batch = make_batch(data, base.device)
    found: list[Tensor] = []

    def note(module: Any, _: tuple[Any, ...], given: dict[str, Any]) -> None:
        shape = (*batch.token_ids.shape, -1, module.head_dim)
        queries = module.q_proj(given["hidden_states"]).view(shape).transpose(1, 2)  # [B, H, T, D]
        queries, _ = apply_rotary_pos_emb(queries, queries, *given["position_embeddings"])
        mean = queries.transpose(1, 2)[batch.rows, batch.columns].mean(0)  # [H, D]
        found.append(mean.view(-1, module.num_key_value_groups, module.head_dim).mean(1))

    layers = base.module.model.layers
    handles = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in layers
    ]
    try:
        positions = torch.arange(start, start + batch.token_ids.shape[1])[None]
        base.module(input_ids=batch.token_ids, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def start_aimed(monkeypatch: pytest.MonkeyPatch, factor: float, count: int) -> None:
    """From now on runs begin with such a prefix."""
    unspoilt = initial_prefix

    def spoilt(
        base: FrozenBase, config: TrainConfig, data: Sequence[EncodedExample]
    ) -> InitialPrefix:
        found = unspoilt(base, config, data)
        return replace(found, key_values=aimed(base, found.key_values, data[:16], factor, count))

    monkeypatch.setattr(session, "initial_prefix", spoilt)


def asked_otherwise(
    base: FrozenBase, held_out: Sequence[EncodedExample], _: Export
) -> HeldOutMetrics:
    """Exact matches of greedy answers to clients that write a chat's roles around each prompt."""
    before, behind = (base.tokenizer.encode(text) for text in ("User: ", "\nAssistant:"))

    def match(prefix: KeyValues, example: EncodedExample) -> bool:
        prompt = (*before, *example.prompt_token_ids, *behind)
        answer: tuple[int, ...] = ()
        for _ in example.completion_token_ids:
            batch = make_batch([EncodedExample((*prompt, *answer), (0,), "")], base.device)
            answer = (*answer, int(base.logits(prefix, batch)[0].argmax()))
        return answer == example.completion_token_ids

    def metrics(prefix: KeyValues) -> dict[str, float]:
        return {"exact_match": 100 * sum(match(prefix, e) for e in held_out[:8]) / 8}

    return metrics
