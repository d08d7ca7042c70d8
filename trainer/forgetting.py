"""The probe for forgetting: perplexity of general text, which a prefix was not trained for, behind it and without it.

Runs on the main thread with the engine in process; called by `evaluate`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from prefix_store.artifact import Prefix
from server.engine.tokenizer import Tokenizer
from trainer.encoding import opening_tokens
from trainer.engine_in_process import EngineInProcess
from trainer.evaluation import Forgetting
from trainer.likelihood import TextToScore, as_rows
from trainer.metrics import loss, perplexity
from trainer.standard_error import difference, score

WINDOW_TOKENS: Final = 256
MAX_WINDOWS: Final = 256  # at most 65,536 tokens: the standard error is far below what matters then
_CHARACTERS_A_TOKEN: Final = (
    16  # more than tokens of text have; keeps a huge file from being tokenized whole
)
_BLANK_LINES: Final = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class GeneralText:
    """A text that no prefix was trained for. `source` says which, for people."""

    text: str
    source: str


def forgetting_of(
    engine: EngineInProcess,
    tokenizer: Tokenizer,
    artifact: bytes,
    prefix: Prefix,
    general: GeneralText | None,
) -> tuple[Forgetting | None, tuple[str, ...]]:
    """What the probe found, or a note why there is none. `prefix` is what `artifact` holds."""
    if general is None:
        return None, (
            "no probe for forgetting: prefixd has general text for its demo model only; "
            "give some with --forgetting-text",
        )
    limit = engine.base.position_limit
    room = (
        WINDOW_TOKENS
        if limit is None
        else min(WINDOW_TOKENS, limit - prefix.manifest.first_position)
    )
    windows = text_windows(tokenizer, general.text, room)
    if not windows:
        return None, (f"no probe for forgetting: {general.source} is shorter than two tokens",)
    behind = as_rows(engine.token_losses(artifact, windows))
    alone = as_rows(engine.token_losses(None, windows))
    found = Forgetting(
        source=general.source,
        num_tokens=sum(len(window.target_token_ids) for window in windows),
        with_prefix=score(behind, perplexity),
        without=score(alone, perplexity),
        lost=difference(behind, alone, loss),
    )
    return found, ()


def text_windows(tokenizer: Tokenizer, text: str, room: int) -> list[TextToScore]:
    """The beginning of `text` in windows of at most `room` tokens, each predicted but for its first token.

    Blank lines separate passages; a window is of one passage, whose beginning the model sees as the beginning
    of a text, with the tokenizer's beginning-of-text token if it has one, as every prompt does.
    """
    windows: list[TextToScore] = []
    for passage in filter(None, map(str.strip, _BLANK_LINES.split(text))):
        if len(windows) < MAX_WINDOWS:
            windows += _passage_windows(tokenizer, passage, room)
    return windows[:MAX_WINDOWS]


def _passage_windows(tokenizer: Tokenizer, passage: str, room: int) -> list[TextToScore]:
    shown = passage[: MAX_WINDOWS * room * _CHARACTERS_A_TOKEN]
    body, opening = tokenizer.encode(shown, special_tokens=False), opening_tokens(tokenizer)
    step = room - len(opening)
    windows = [opening + body[start : start + step] for start in range(0, len(body), step)]
    first = max(1, len(opening))
    return [TextToScore(w[:first], w[first:]) for w in windows if len(w) > first]
