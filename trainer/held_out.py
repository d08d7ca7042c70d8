"""Held-out examples from a file, as the tokens that the prefix was trained on. Called by the commands that judge one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from prefix_store.artifact import read_header
from prefix_store.errors import MalformedArtifact
from server.engine.tokenizer import Tokenizer
from trainer.data import Fields, read_examples
from trainer.encoding import EncodedExample, EncodingSettings, ExampleEncoder, Notice


class Joint(NamedTuple):
    """How a completion begins and ends, beside its own text: `EncodingSettings` says more."""

    separator: str | None = None
    stop: tuple[str, ...] = ()


def joint_of(artifact: bytes) -> Joint:
    """What the artifact's completions were trained with; of a file that is none, and of other trainers' artifacts, nothing is known."""
    try:
        manifest = read_header(artifact, len(artifact)).manifest
    except MalformedArtifact:
        return Joint()
    separator = (manifest.training or {}).get("separator")
    stop = manifest.generation.stop if manifest.generation else ()
    return Joint(separator if isinstance(separator, str) else None, tuple(stop or ()))


def read_held_out(
    path: Path,
    tokenizer: Tokenizer,
    end_token_ids: frozenset[int],
    fields: Fields | None = None,
    joint: Joint | None = None,
) -> tuple[list[EncodedExample], list[Notice]]:
    """The examples of a data file as training encodes them, and what is worth knowing. Raises `BadData`."""
    separator, stop = joint or Joint()
    settings = EncodingSettings(separator, end_token_ids, stop)
    return ExampleEncoder(tokenizer, settings).encode(read_examples(path, fields or Fields()))
