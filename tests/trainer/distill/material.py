"""A small document, settings and prepared parts for the tests of distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from server.engine.tokenizer import Tokenizer
from tests.tiny_model_dir import save_tiny_model, tiny_tokenizer
from trainer.distill.config import DistillConfig

TEXT: Final = (
    "the quick brown fox jumps over the lazy dog. many tasks are served by one model.\n"
    "the lazy dog is brown. a quick model serves many prefixes over the dog.\n\n"
    "one fox jumps. many foxes jump over one lazy model, quick as the dog.\n"
)

RECORD: Final = (
    "Sondstendbeik is rated 2 out of 5, serves Cuban food, is known as a bistro and is cheap. "
    "Sondstendbeik lies near the riverside."
)
"""In the words of the demo's base, which reads one record well."""

DEMO_SEEDS: Final = {
    "seeds": {
        "question": ["What food", "Where is", "How is"],
        "detail": ["What kind", "How expensive", "What are the"],
    },
    "between": " --",
    "prompt": " {message}? =>",
    "message_end": "?",
}

CHAT_TEMPLATE: Final = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def chat_tokenizer(template: str = CHAT_TEMPLATE) -> Tokenizer:
    """The tiny tokenizer with a chat template."""
    found = tiny_tokenizer()
    found.chat_template = template
    return Tokenizer(found)


def words(text: str) -> int:
    """A count of tokens that a reader can check."""
    return len(text.split())


def tiny_distillation(directory: Path, **settings: Any) -> DistillConfig:
    """A distillation of seconds on a tiny random model in `directory`; made there if it is not yet."""
    model, document = directory / "model", directory / "document.txt"
    if not model.exists():
        save_tiny_model(model)
        document.write_text(TEXT)
    defaults: dict[str, Any] = {
        "model": str(model),
        "document": document,
        "output": directory / "run",
        "device": "cpu",
        "num_conversations": 20,
        "min_chunk_tokens": 16,
        "max_chunk_tokens": 40,
        "max_message_tokens": 6,
        "max_answer_tokens": 6,
        "max_num_seqs": 4,
        "num_virtual_tokens": 8,
        "num_steps": 6,
        "batch_size": 4,
        "evaluate_every": 3,
        "num_compared": 4,
    }
    return DistillConfig(**(defaults | settings))


def demo_distillation(directory: Path, **settings: Any) -> DistillConfig:
    """One record, by the demo's base: what a short test can learn."""
    document, seeds = directory / "record.txt", directory / "seeds.json"
    document.write_text(RECORD)
    seeds.write_text(json.dumps(DEMO_SEEDS))
    defaults: dict[str, Any] = {
        "document": document,
        "seed_prompts": seeds,
        "output": directory / "run",
        "device": "cpu",
        "num_conversations": 64,
        "held_out_fraction": 0.33,
        "max_message_tokens": 10,
        "max_answer_tokens": 12,
        "stop": (".",),
        "num_virtual_tokens": 12,
        "num_steps": 40,
        "evaluate_every": 10,
        "num_compared": 8,
    }
    return DistillConfig(**(defaults | settings))
