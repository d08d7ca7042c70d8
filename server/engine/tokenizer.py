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
from server.engine.token_bytes import shown_bytes, token_bytes
from server.errors import InvalidParameter
from server.types import TokenizerFacts, TokenText

_INCOMPLETE: Final = "\ufffd"  # what a decoder gives for the first bytes of a character
# More tokens than any one character takes: bytes that are still incomplete then will stay so. Bounds the
# cost of a push.
_MAX_WINDOW: Final = 64
_SPACE: Final = "\u2581"  # how SentencePiece writes it
_CONTEXT: Final = 8  # prompt tokens that may influence the text of the first output token


class Tokenizer:
    """A transformers tokenizer, reduced to what serving needs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._chat_template = _template_of(tokenizer)  # fixed here: a request brings none
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._token_texts: dict[int, TokenText] = {}

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """The tokenizer of a model directory or hub id; `chat_template` in place of its own."""
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), revision=revision, trust_remote_code=False
        )
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        return cls(tokenizer)

    def fingerprint(self) -> str:
        """Which tokenizer it is, by what it does."""
        return tokenizer_fingerprint(self._tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end of text, if it has one; the model may stop at others too."""
        found: int | None = self._tokenizer.eos_token_id
        return found

    def encode(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids, with the special tokens that the model's tokenizer adds by default, or without these.

        Special tokens that are written in the text are tokens either way: whoever sends it can forge the turn of a chat.
        """
        return tuple(self._tokenizer(text, add_special_tokens=special_tokens)["input_ids"])

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[int, ...]:
        """Token ids of a conversation in the model's own chat template, which is a program in a sandbox of transformers'.

        Raises `InvalidParameter` when the tokenizer has none, or its template refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidParameter(
                "messages: this model's tokenizer has no chat template; send a prompt",
                param="messages",
            )
        try:
            encoding = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=True,
            )
        except TemplateError as error:
            raise InvalidParameter(f"messages: {error}", param="messages") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # The template's own mistakes, that these messages bring about: a 500 would be repeated.
            raise InvalidParameter(
                "messages: the model's chat template fails on them", param="messages"
            ) from None
        return tuple(encoding["input_ids"])

    def decode(self, token_ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """Text of a run of tokens, special tokens left out unless asked for."""
        return str(
            self._tokenizer.decode(
                list(token_ids),
                skip_special_tokens=not special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def token_text(self, token_id: int) -> TokenText:
        """One token by itself. Kept, as few tokens make most texts."""
        if token_id not in self._token_texts:
            self._token_texts[token_id] = self._token_text(token_id)
        return self._token_texts[token_id]

    def _token_text(self, token_id: int) -> TokenText:
        if token_id >= len(self._tokenizer):
            return TokenText("", b"", False)  # a model may have more tokens than its tokenizer
        text = self.decode([token_id], special_tokens=True)
        piece = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if piece.startswith(_SPACE) and not text.startswith(" "):
            text = (
                " " + text
            )  # a decoder drops it at the start of a text, and the token is not there
        special = token_id in self._special_ids
        if _INCOMPLETE not in text:
            return TokenText(text, text.encode("utf-8", "replace"), special)
        raw = token_bytes(piece, text)
        return TokenText(text if raw is None else shown_bytes(raw), raw, special)

    def facts(self) -> TokenizerFacts:
        """Its special tokens, size and chat template."""
        tokenizer = self._tokenizer
        return TokenizerFacts(
            name=type(tokenizer).__name__,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            unk_token=tokenizer.unk_token,
            vocab_size=len(tokenizer),
            chat_template=self._chat_template,
        )


def _template_of(tokenizer: Any) -> str | None:
    """The one that conversations are written in; of several the default, and none if there is no default."""
    templates = tokenizer.chat_template
    found = templates.get("default") if isinstance(templates, dict) else templates
    return str(found) if found else None


class Detokenizer:
    """Turns one sequence's tokens into text increments. Joined, they are the text of all tokens.

    A token's text can depend on its neighbours (a space, half a character). So a window of recent tokens
    is decoded with and without the new ones, and what was added is given out once it ends in a whole
    character.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, special_tokens: bool = False
    ) -> None:
        """`prompt`: the tokens before the first; without them its leading space would be lost."""
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._tokens = list(prompt[-_CONTEXT:])
        self._window = 0  # first token that still influences the next one's text
        self._given = len(self._tokens)  # tokens whose text has been given out

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens; may be empty."""
        self._tokens.extend(token_ids)
        before = self._decode(self._tokens[self._window : self._given])
        after = self._decode(self._tokens[self._window :])
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
        before = self._decode(self._tokens[self._window : self._given])
        after = self._decode(self._tokens[self._window :])
        self._given = len(self._tokens)
        return after[len(before) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, special_tokens=self._special_tokens)
