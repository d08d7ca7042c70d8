"""The lengths of one distillation, by the settings, the document and the model's positions. Called by `distillation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trainer.distill.config import DistillConfig
from trainer.distill.document import Document
from trainer.distill.framing import Framing
from trainer.distill.seed_prompts import SeedPrompts
from trainer.errors import BadData, BadSetting

_NUM_VIRTUAL_TOKENS: Final = 128
_MESSAGE: Final = 128
_ANSWER: Final = 256
_SHORTEST_CHUNK: Final = 16
_SLACK: Final = 16  # a text that is encoded in one piece may have a few tokens more than its parts


@dataclass(frozen=True, slots=True)
class Plan:
    """All in tokens. `around`: what stands around a message, seed prompt and template, at most.

    Document chunk, message and answer fit into the model together; so do prefix, message and answer.
    """

    num_virtual_tokens: int
    min_chunk: int
    max_chunk: int
    max_message: int
    max_answer: int
    around: int
    position_limit: int | None

    def fits(self, num_prompt_tokens: int) -> bool:
        """Whether the model has positions for such a prompt and an answer."""
        return (
            self.position_limit is None
            or num_prompt_tokens + self.max_answer <= self.position_limit
        )


def make_plan(
    config: DistillConfig,
    document: Document,
    framing: Framing,
    form: SeedPrompts,
    position_limit: int | None,
) -> Plan:
    """Raises `BadData` or `BadSetting` where document or model are too short for what is asked for."""
    message = config.max_message_tokens or _default(_MESSAGE, position_limit, 8)
    answer = config.max_answer_tokens or _default(_ANSWER, position_limit, 4)
    around = max(len(framing.eliciting("", seed)) for _, seed in form.flat)
    low, high = config.min_chunk_tokens, config.max_chunk_tokens
    count = _num_virtual_tokens(config, document)
    if position_limit is not None:
        room = position_limit - around - message - answer - _SLACK
        told = f"the model has {position_limit} positions, messages up to {around + message} tokens, answers up to {answer}"
        if room < _SHORTEST_CHUNK:
            raise BadSetting(
                f"max_message_tokens, max_answer_tokens: {told}: no room for a part of the document"
            )
        if count > room:
            raise BadSetting(f"num_virtual_tokens: {told}: no room for a prefix of {count}")
        low, high = min(low, room), min(high, room)
    return Plan(count, low, high, message, answer, around, position_limit)


def _default(most: int, position_limit: int | None, share: int) -> int:
    return most if position_limit is None else max(4, min(most, position_limit // share))


def _num_virtual_tokens(config: DistillConfig, document: Document) -> int:
    """P: fewer than the document has tokens, or there is nothing to gain."""
    total = document.num_tokens
    if total < 4:
        raise BadData(f"{config.document}: {total} tokens; expected a document of at least 4")
    count = config.num_virtual_tokens or min(_NUM_VIRTUAL_TOKENS, total // 4)
    if count >= total:
        raise BadSetting(
            f"num_virtual_tokens: {count}, but the document has {total} tokens: expected a shorter prefix"
        )
    if config.num_frozen_tokens >= count:
        raise BadSetting(
            f"num_frozen_tokens: {config.num_frozen_tokens} of {count} leave nothing to train"
        )
    return count
