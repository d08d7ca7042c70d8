"""Text to token ids, and token ids back to text as they come.

`Tokenizer` is called by the event-loop side only, `encode` on a worker thread because a long prompt takes
a while. The engine thread never sees text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError
from transformers import AutoTokenizer

from prefix_store.fingerprint import tokenizer_fingerprint
from server.errors import InvalidParameter

_INCOMPLETE: Final = "\ufffd"  # what a decoder gives for the first bytes of a character
# More tokens than any one character takes: bytes that are still incomplete then will stay so. Bounds the
# cost of a push.
_MAX_WINDOW: Final = 64
_CONTEXT: Final = 8  # prompt tokens that may influence the text of the first output token


class Tokenizer:
    """A transformers tokenizer, reduced to what serving needs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None) -> Tokenizer:
        """The tokenizer of a model directory or hub id."""
        return cls(
            AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
        )

    def fingerprint(self) -> str:
        """Which tokenizer it is, by what it does."""
        return tokenizer_fingerprint(self._tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end of text, if it has one; the model may stop at others too."""
        found: int | None = self._tokenizer.eos_token_id
        return found

    def encode(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids, with the special tokens that the model's tokenizer adds by default.

        Without them only where a text is the continuation of another: requests always get them.
        """
        return tuple(self._tokenizer(text, add_special_tokens=special_tokens)["input_ids"])

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[int, ...]:
        """Token ids of a conversation in the model's own chat template.

        Raises `InvalidParameter` when the tokenizer has none, or its template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidParameter(
                "messages: this model's tokenizer has no chat template; send a prompt",
                param="messages",
            )
        try:
            encoding = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=True,
            )
        except TemplateError as error:
            raise InvalidParameter(f"messages: {error}", param="messages") from None
        return tuple(encoding["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a run of tokens, special tokens left out."""
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class Detokenizer:
    """Turns one sequence's tokens into text increments. Joined, they are the text of all tokens.

    A token's text can depend on its neighbours (a space, half a character). So a window of recent tokens
    is decoded with and without the new ones, and what was added is given out once it ends in a whole
    character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """`prompt`: the tokens before the first; without them its leading space would be lost."""
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._window = 0  # first token that still influences the next one's text
        self._given = len(self._tokens)  # tokens whose text has been given out

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens; may be empty."""
        self._tokens.extend(token_ids)
        before = self._tokenizer.decode(self._tokens[self._window : self._given])
        after = self._tokenizer.decode(self._tokens[self._window :])
        num_pending = len(self._tokens) - self._given
        if after.endswith(_INCOMPLETE) and num_pending <= _MAX_WINDOW:
            return ""
        if len(after) > len(before):
            self._window, self._given = self._given, len(self._tokens)
        elif num_pending > _MAX_WINDOW:
            del self._tokens[
                self._given :
            ]  # a run of special tokens: it has no text and gives none
        return after[len(before) :]

    def flush(self) -> str:
        """What is still held back, as far as it can be decoded."""
        before = self._tokenizer.decode(self._tokens[self._window : self._given])
        after = self._tokenizer.decode(self._tokens[self._window :])
        self._given = len(self._tokens)
        return after[len(before) :]
