"""Small bases, examples and runs for the trainer's tests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from server.engine.tokenizer import Tokenizer
from server.model.loader import adopt_model
from tests.tiny_model_dir import save_tiny_model, tiny_tokenizer
from tests.tiny_models import VOCAB, tiny_model
from trainer.base import FrozenBase, adopt_base
from trainer.config import TrainConfig
from trainer.encoding import EncodedExample
from trainer.prefix_cache import KeyValues
from trainer.records import Record

ARCHITECTURES: Final = ("gpt2", "llama", "qwen3", "gemma")
_WORDS: Final = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "many", "tasks")


def tiny_base(architecture: str = "llama", *, double: bool = False, **overrides: Any) -> FrozenBase:
    """A random model as training sees it; `double`: in float64."""
    module = tiny_model(architecture, **overrides)
    base = adopt_base(adopt_model(module, model_id="tiny"), Tokenizer(tiny_tokenizer()))
    if double:
        module.double()
    return base


def random_examples(count: int, seed: int = 0) -> list[EncodedExample]:
    """Of unequal lengths, so that every batch is padded."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(least, most)))

    return [EncodedExample(tokens(1, 9), (*tokens(1, 5), 2), "") for _ in range(count)]


def random_prefix(base: FrozenBase, length: int, seed: int = 0) -> KeyValues:
    """Keys and values of `length` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (length,), generator=generator)
    with torch.no_grad():
        return base.key_values(ids)


def write_examples(path: Path, count: int, seed: int = 0) -> Path:
    """JSONL: three words, and the first of them as the completion."""
    rng = random.Random(seed)
    rows = [[rng.choice(_WORDS) for _ in range(3)] for _ in range(count)]
    lines = [json.dumps({"prompt": " ".join(row), "completion": row[0]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class Recorder:
    """An observer that remembers."""

    records: list[Record] = field(default_factory=list)

    def on_record(self, record: Record) -> None:
        self.records.append(record)

    def of(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def losses(self) -> list[float]:
        return [float(record["loss"]) for record in self.of("step")]


def small_run(directory: Path, **settings: Any) -> TrainConfig:
    """A run of a few steps on a tiny model in `directory`; made there if it is not yet."""
    model = directory / "model"
    if not model.exists():
        save_tiny_model(model, settings.pop("architecture", "llama"))
        write_examples(directory / "data.jsonl", 40)
    defaults: dict[str, Any] = {
        "model": str(model),
        "data": directory / "data.jsonl",
        "output": directory / "run",
        "device": "cpu",
        "num_virtual_tokens": 4,
        "num_steps": 12,
        "batch_size": 4,
        "evaluate_every": 4,
        "learning_rate": 0.02,
    }
    return TrainConfig(**(defaults | settings))


def artifact_tensors(path: Path) -> Sequence[torch.Tensor]:
    """All tensors of a stored prefix."""
    from prefix_store.artifact import decode, digest_of

    data = path.read_bytes()
    prefix = decode(data, digest_of(data))
    return (*prefix.keys, *prefix.values)
