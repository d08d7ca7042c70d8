"""What conversations begin from: five kinds of requests for a message, as Cartridges has them, or a user's own.

For a model with a chat template a seed prompt asks for a message about the document; for a plain language model it is how
a message begins, which the model then goes on with. Pure; called by `self_study`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import BadSetting

SLOT: Final = "{message}"

_Seed = Annotated[str, Field(min_length=1, max_length=4000)]

CHAT_SEEDS: Final[dict[str, tuple[str, ...]]] = {
    "structure": (
        "Write one message in which a user asks for a part of the document's information in a form such as a table, "
        "a list or JSON. Name the part and the form.",
        "Write one message in which a user asks for all entries of one kind in the document, in order.",
    ),
    "summary": (
        "Write one message in which a user asks for a summary of one part of the document. Name the part.",
        "Write one message in which a user asks for the main points of one part of the document in a few sentences.",
    ),
    "question": (
        "Write one question that tests whether someone knows a detail of the document: a name, a number or a date.",
        "Write one question whose answer needs two statements of the document together.",
    ),
    "use_case": (
        "Think of someone who needs this document for their work. Write the question that they would ask.",
        "Write one message in which a user describes a situation and asks what follows from the document for it.",
    ),
    "creative": (
        "Write one message in which a user asks for something creative from the document: a dialogue, a poem, a riddle.",
        "Write one unusual question about the document that makes its reader think.",
    ),
}

PLAIN_SEEDS: Final[dict[str, tuple[str, ...]]] = {
    "structure": (
        "List in order everything that is said about",
        "Write as a table what is said about",
    ),
    "summary": ("Summarise in one sentence what is said about", "Name the main points about"),
    "question": ("What", "Who", "When", "Where", "How", "Which", "Why"),
    "use_case": ("How can someone use what is said about", "What follows in practice from"),
    "creative": ("Write a short poem about", "Invent a dialogue about"),
}


class SeedPrompts(BaseModel):
    """`seeds`: by kind. The rest is for plain language models and not read where there is a chat template.

    `between` stands between document and prompt; `prompt` is what is served, with the message in its slot;
    `message_end` ends a message where it is generated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: dict[str, Annotated[tuple[_Seed, ...], Field(min_length=1)]] = Field(min_length=1)
    between: str = "\n\n"
    prompt: str = "Question: {message}\nAnswer:"
    message_end: Annotated[str, Field(min_length=1, max_length=128)] = "\n"

    @property
    def flat(self) -> list[tuple[str, str]]:
        """(kind, seed), the kinds in turn: the n-th of each kind, then the next ones."""
        longest = max(map(len, self.seeds.values()))
        return [
            (kind, seeds[n % len(seeds)])
            for n in range(longest)
            for kind, seeds in self.seeds.items()
        ]

    @property
    def around(self) -> tuple[str, str]:
        """What stands before and behind the message in a prompt."""
        before, _, behind = self.prompt.partition(SLOT)
        return before, behind


def load_seed_prompts(path: Path | None, *, chat: bool) -> SeedPrompts:
    """The user's file, or our own. Raises `BadSetting`, which says what the file should hold."""
    if path is None:
        return SeedPrompts(seeds=dict(CHAT_SEEDS if chat else PLAIN_SEEDS))
    try:
        found = SeedPrompts.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadSetting(f"seed_prompts: {path}: {error.strerror}") from None
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False)
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BadSetting(f"seed_prompts: {path}: {where}: {first['msg']}") from None
    if found.prompt.count(SLOT) != 1:
        raise BadSetting(
            f"seed_prompts: {path}: prompt: expected {SLOT} once, got {found.prompt!r}"
        )
    return found
