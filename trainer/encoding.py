"""Examples as tokens: the same tokens that the server would make of the same prompt. Pure, on any thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One example as tokens, and the text that a right answer is."""

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    reference: str
