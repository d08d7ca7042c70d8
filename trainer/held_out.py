"""Held-out examples from a file, as tokens. Called by the commands that judge a prefix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.engine.tokenizer import Tokenizer
from trainer.encoding import EncodedExample
from trainer.errors import BadData


def read_held_out(
    path: Path, tokenizer: Tokenizer, end_token_ids: frozenset[int]
) -> list[EncodedExample]:
    """The examples of a JSONL file with `prompt` and `completion` in each line; blank lines are none.

    A completion ends with the model's end of text, as a right answer does when it is generated. Raises `BadData`
    with the number of the first line that is not so.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path}: {error}") from None
    end = tuple(sorted(end_token_ids))[:1]
    examples = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompt, completion = _texts(path, number, line)
            examples.append(_encode(tokenizer, prompt, completion, end))
    return examples


def _texts(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise BadData(f"{path}, line {number}: not JSON: {error}") from None
    texts = [
        value.get(key) if isinstance(value, dict) else None for key in ("prompt", "completion")
    ]
    prompt, completion = texts
    if not (isinstance(prompt, str) and prompt and isinstance(completion, str) and completion):
        raise BadData(
            f"{path}, line {number}: expected an object with the texts 'prompt' and 'completion', "
            "neither of them empty"
        )
    return prompt, completion


def _encode(
    tokenizer: Tokenizer, prompt: str, completion: str, end: tuple[int, ...]
) -> EncodedExample:
    """The prompt as the server tokenizes it, and what follows it in the tokens of both together."""
    prompt_ids = tokenizer.encode(prompt)
    joint = tokenizer.encode(prompt + completion)
    if joint[: len(prompt_ids)] == prompt_ids and len(joint) > len(prompt_ids):
        completion_ids = joint[len(prompt_ids) :]
    else:  # the border runs through a token: the completion gets tokens of its own, as in serving
        opening = tokenizer.encode("")
        alone = tokenizer.encode(completion)
        completion_ids = alone[len(opening) :] if alone[: len(opening)] == opening else alone
    return EncodedExample(prompt_ids, completion_ids + end, completion)
