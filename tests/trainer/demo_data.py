"""Examples and prefixes of the demo's tasks, as the trainer takes them. Called by tests only."""

from __future__ import annotations

import json
from pathlib import Path

import demo
from demo.build.tasks import TASKS, examples
from server.engine.tokenizer import Tokenizer
from trainer.encoding import EncodedExample

SEED = 9_001
END_OF_TEXT = 0


def bundled(task: str) -> bytes:
    """The artifact that ships for a task."""
    return (demo.PREFIXES_DIR / f"{task}.safetensors").read_bytes()


def held_out(tokenizer: Tokenizer, task: str, count: int) -> list[EncodedExample]:
    """Examples with names that no prefix has seen."""
    return [
        EncodedExample(
            tokenizer.encode(item.prompt),
            (*tokenizer.encode(item.answer), END_OF_TEXT),
            f" {item.answer}",
        )
        for item in examples(TASKS[task], SEED, count, "test")
    ]


def write_jsonl(path: Path, task: str, count: int) -> Path:
    """The same examples as a file."""
    lines = [
        json.dumps({"prompt": item.prompt, "completion": f" {item.answer}"})
        for item in examples(TASKS[task], SEED, count, "test")
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
