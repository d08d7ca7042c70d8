"""Conversations about the document, and the file in the run folder that holds them. Called by `self_study`.

One JSON object a line, in the order of their numbers; written as they are made, so a run that is resumed has them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import CannotResume
from trainer.run_folder import append_durably, cut_torn_line, truncate


@dataclass(frozen=True, slots=True)
class Conversation:
    """One message and its answer by the base that saw `chunk`. `number` counts from 0.

    `prompt_token_ids` is what is served; `teacher_token_ids` the same with the chunk before it. `answer_token_ids` end with
    the token that ended the answer, if one did. `left_out`: why it is not used, if it is not.
    """

    number: int
    kind: str
    chunk: tuple[int, int]
    message: str
    answer: str
    prompt_token_ids: tuple[int, ...]
    teacher_token_ids: tuple[int, ...]
    answer_token_ids: tuple[int, ...]
    left_out: str = ""


def append_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """Behind those that the file holds, and durable when this returns. Raises `RunFolderFailed`."""
    lines = [json.dumps(asdict(c), ensure_ascii=False) + "\n" for c in conversations]
    append_durably(path, "".join(lines).encode())


def read_conversations(path: Path, total: int, round_size: int) -> list[Conversation]:
    """Those that are there, none if the file is not. Raises `CannotResume`.

    What a killed run left of its last round is cut off: a round that is made again has the batches of the first time.
    """
    if not path.exists():
        return []
    cut_torn_line(path)
    lines = path.read_bytes().splitlines(keepends=True)
    if len(lines) != total:
        lines = lines[: len(lines) // round_size * round_size]
        truncate(path, sum(map(len, lines)))
    found: list[Conversation] = []
    for line in lines:
        try:
            conversation = _conversation(json.loads(line))
        except (ValueError, TypeError) as error:
            raise CannotResume(f"{path}, line {len(found) + 1}: no conversation: {error}") from None
        if conversation.number != len(found):
            raise CannotResume(
                f"{path}, line {len(found) + 1}: expected conversation {len(found)}, got {conversation.number}"
            )
        found.append(conversation)
    return found


def _conversation(row: Any) -> Conversation:
    if not isinstance(row, dict):
        raise TypeError("expected an object")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Conversation(**fields)
