"""An example that knows its conversation, and so its teacher's logits. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data import Example, split
from trainer.distill.conversations import Conversation
from trainer.encoding import EncodedExample
from trainer.errors import BadData


@dataclass(frozen=True, slots=True)
class StudiedExample(EncodedExample):
    """What is served and what the base answered. `conversation`: whose logits it is trained on, by number.

    It stays what it is when `dataclasses.replace` gives it another prompt.
    """

    conversation: int


def studied_examples(
    conversations: list[Conversation], fraction: float, seed: int
) -> tuple[list[StudiedExample], list[StudiedExample]]:
    """Training and held-out examples; the same message is never on both sides. Raises `BadData` for too few."""
    used = [c for c in conversations if not c.left_out]
    if len(used) < 2:
        raise BadData(
            f"{len(used)} of {len(conversations)} conversations can be used; expected at least two, to hold one out"
        )
    named = [Example(c.message, c.answer, index) for index, c in enumerate(used)]
    training, held_out = split(named, fraction, seed)
    return [_studied(used[e.line]) for e in training], [_studied(used[e.line]) for e in held_out]


def _studied(found: Conversation) -> StudiedExample:
    return StudiedExample(
        found.prompt_token_ids, found.answer_token_ids, found.answer, found.number
    )
