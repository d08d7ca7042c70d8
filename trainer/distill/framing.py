"""How document and message are put before the base: by its chat template, or as plain text. Called by `self_study`.

Three things are written: what elicits a message, what the teacher answers (document and message), and what is served and
trained on (the message alone). The end of the teacher's tokens is what is served, so the prefix stands where the document did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from server.engine.tokenizer import Tokenizer
from server.errors import InvalidParameter
from trainer.distill.seed_prompts import SeedPrompts
from trainer.encoding import with_text

_ABOUT: Final = (
    "This is a document, or a part of one.\n\n{document}\n\nMessages are about this document."
)
_ASK: Final = "{seed} Write the message alone, as its user would, with nothing before or behind it."


class Framing(Protocol):
    """Token ids of what the base is given."""

    @property
    def message_stop(self) -> tuple[str, ...]:
        """Stop strings of a message that is generated."""

    def eliciting(self, document: str, seed: str) -> tuple[int, ...]:
        """What the base goes on with by a message."""

    def message(self, seed: str, generated: str) -> str:
        """The message, of what came."""

    def teacher(self, document: str, message: str) -> tuple[int, ...]:
        """What the base answers with the document before it."""

    def served(self, message: str) -> tuple[int, ...]:
        """What is answered behind the prefix."""

    def document(self, text: str) -> tuple[int, ...]:
        """What stands where the prefix will; at least as many tokens as the document has."""


@dataclass(frozen=True, slots=True)
class PlainFraming:
    """For language models without a chat template."""

    tokenizer: Tokenizer
    form: SeedPrompts

    @property
    def message_stop(self) -> tuple[str, ...]:
        return (self.form.message_end,)

    def eliciting(self, document: str, seed: str) -> tuple[int, ...]:
        return self._behind(document, self.tokenizer.encode(self.form.around[0] + seed))

    def message(self, seed: str, generated: str) -> str:
        return f"{seed}{generated}".strip()

    def teacher(self, document: str, message: str) -> tuple[int, ...]:
        return self._behind(document, self.served(message))

    def served(self, message: str) -> tuple[int, ...]:
        before, behind = self.form.around
        return self.tokenizer.encode(before + message + behind)

    def document(self, text: str) -> tuple[int, ...]:
        return self.tokenizer.encode(text)

    def _behind(self, document: str, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return with_text(self.tokenizer, document + self.form.between, prompt)


@dataclass(frozen=True, slots=True)
class ChatFraming:
    """For models with a chat template. `system`: it has a turn for the document; else the user's turn begins with it."""

    tokenizer: Tokenizer
    system: bool

    @property
    def message_stop(self) -> tuple[str, ...]:
        return ()

    def eliciting(self, document: str, seed: str) -> tuple[int, ...]:
        return self.teacher(document, _ASK.format(seed=seed))

    def message(self, seed: str, generated: str) -> str:  # noqa: ARG002 - the seed only asked for it
        return generated.strip()

    def teacher(self, document: str, message: str) -> tuple[int, ...]:
        about = _ABOUT.format(document=document)
        if not self.system:
            return self._encoded({"role": "user", "content": f"{about}\n\n{message}"})
        return self._encoded(
            {"role": "system", "content": about}, {"role": "user", "content": message}
        )

    def served(self, message: str) -> tuple[int, ...]:
        return self._encoded({"role": "user", "content": message})

    def document(self, text: str) -> tuple[int, ...]:
        return self.teacher(text, "?")

    def _encoded(self, *turns: dict[str, str]) -> tuple[int, ...]:
        return self.tokenizer.encode_chat(turns, add_generation_prompt=True)


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer writes conversations."""
    try:
        return bool(tokenizer.encode_chat([{"role": "user", "content": "a"}]))
    except InvalidParameter:
        return False


def framing_for(tokenizer: Tokenizer, form: SeedPrompts) -> Framing:
    """By what the tokenizer has. A template may refuse a system turn, or drop it without a word."""
    if not has_chat_template(tokenizer):
        return PlainFraming(tokenizer, form)
    user = {"role": "user", "content": "a"}
    try:
        one, other = (
            tokenizer.encode_chat([{"role": "system", "content": text}, user]) for text in "bc"
        )
    except InvalidParameter:
        return ChatFraming(tokenizer, system=False)
    return ChatFraming(tokenizer, system=one != other)
