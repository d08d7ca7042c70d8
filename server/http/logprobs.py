"""Log-probabilities in OpenAI's two shapes: columns for completions, a list of tokens for chats.

Pure; called by the answers of `completions` and `chat` with what the engine told of each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.http.services import Engine
from server.types import TokenLogprob, TokenText


@dataclass(slots=True)
class LogprobColumns:
    """One choice's `logprobs` of a completion, token after token. `offset`: where the next token's text begins in the
    answer's. A special token has no text in an answer, if these are skipped.
    """

    engine: Engine
    skip_special_tokens: bool
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add_first(self, token_id: int) -> None:
        """The first token of a prompt: nothing stands before it that could make it probable."""
        self._add(self.engine.token_text(token_id), None, None)

    def add(self, entries: Iterable[TokenLogprob]) -> None:
        """Tokens with their probabilities."""
        for entry in entries:
            token = self.engine.token_text(entry.token_id)
            top: dict[str, float] = {}
            # Different tokens can have one text. The more probable one is kept: readers take the maximum.
            for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
                top.setdefault(self.engine.token_text(token_id).text, logprob)
            self._add(token, entry.logprob, top)

    def _add(self, token: TokenText, logprob: float | None, top: dict[str, float] | None) -> None:
        self.tokens.append(token.text)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(self.offset)
        if not (token.special and self.skip_special_tokens):
            self.offset += len(token.text)

    def take(self) -> dict[str, Any]:
        """What came since this was last asked."""
        taken = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return taken


def chat_logprobs(engine: Engine, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of a chat's choice or delta."""
    return {"content": [_chat_entry(engine, entry) for entry in entries], "refusal": None}


def _chat_entry(engine: Engine, entry: TokenLogprob) -> dict[str, Any]:
    top = [_chat_token(engine, token_id, logprob) for token_id, logprob in entry.top]
    return {**_chat_token(engine, entry.token_id, entry.logprob), "top_logprobs": top}


def _chat_token(engine: Engine, token_id: int, logprob: float) -> dict[str, Any]:
    token = engine.token_text(token_id)
    raw = None if token.raw is None else list(token.raw)
    return {"token": token.text, "logprob": logprob, "bytes": raw}
