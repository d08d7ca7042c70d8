"""Held-out examples from a file, as tokens. Called by the commands that judge a prefix."""

from __future__ import annotations

from pathlib import Path

from server.engine.tokenizer import Tokenizer
from trainer.data import Fields, read_examples
from trainer.encoding import EncodedExample, EncodingSettings, ExampleEncoder, Notice


def read_held_out(
    path: Path, tokenizer: Tokenizer, end_token_ids: frozenset[int], fields: Fields | None = None
) -> tuple[list[EncodedExample], list[Notice]]:
    """The examples of a data file as training encodes them, and what is worth knowing. Raises `BadData`."""
    settings = EncodingSettings(separator=None, end_token_ids=end_token_ids)
    return ExampleEncoder(tokenizer, settings).encode(read_examples(path, fields or Fields()))
