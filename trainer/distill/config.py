"""The settings of `prefixd distill`: those of training, but for its data, and those of the self-study.

Each field is a flag. Built by `cli_distill` or by a program; loads nothing heavy. Errors are `BadSetting`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from cyclopts import Group, Parameter
from pydantic import Field, model_validator

from trainer.config import InitKind, TrainConfig

_STUDY: Final = Group.create_ordered("Self-study")
_PREFIX: Final = "Prefix"  # the group that training has them in
_COMPARISON: Final = Group.create_ordered("Comparison")
_DECIDED: Final = Parameter(parse=False)
"""A setting of training that has no choice here: the data is what the self-study wrote."""


@Parameter(name="*")
class DistillConfig(TrainConfig):
    """The settings of `prefixd distill`. Raises `BadSetting`, never pydantic's error."""

    document: Annotated[Path, Parameter(group=_STUDY)] = Field(
        description="The text to distil, UTF-8; it may be longer than the model's context"
    )
    num_conversations: Annotated[int, Parameter(group=_STUDY)] = Field(
        default=1000, ge=2, le=10_000_000, description="Conversations that the base generates"
    )
    seed_prompts: Annotated[Path | None, Parameter(group=_STUDY)] = Field(
        default=None,
        description="JSON with what conversations begin from; five kinds of our own if left out",
    )
    min_chunk_tokens: Annotated[int, Parameter(group=_STUDY)] = Field(
        default=512, ge=16, description="Shortest part of the document that the teacher sees"
    )
    max_chunk_tokens: Annotated[int, Parameter(group=_STUDY)] = Field(
        default=4096, ge=16, description="Longest part; less if the model has no positions for it"
    )
    max_message_tokens: Annotated[int | None, Parameter(group=_STUDY)] = Field(
        default=None,
        ge=4,
        description="Longest question; 128, or an eighth of the model's positions",
    )
    max_answer_tokens: Annotated[int | None, Parameter(group=_STUDY)] = Field(
        default=None, ge=1, description="Longest answer; 256, or a quarter of the model's positions"
    )
    message_temperature: Annotated[float, Parameter(group=_STUDY)] = Field(
        default=0.6, ge=0, le=2, description="At which questions are sampled"
    )
    answer_temperature: Annotated[float, Parameter(group=_STUDY)] = Field(
        default=0.0, ge=0, le=2, description="At which answers are; 0: greedy"
    )
    max_num_seqs: Annotated[int, Parameter(group=_STUDY)] = Field(
        default=16, ge=1, le=4096, description="Conversations that are generated at a time"
    )
    top_k: Annotated[int, Parameter(group=_STUDY)] = Field(
        default=20, ge=1, le=1000, description="Teacher's logits that are kept for each token"
    )
    num_compared: Annotated[int, Parameter(group=_COMPARISON)] = Field(
        default=64, ge=1, description="Held-out conversations that the comparison answers"
    )

    data: Annotated[Path, _DECIDED] = Field(default=Path(), description="What the study wrote")
    held_out: Annotated[None, _DECIDED] = None
    prompt_field: Annotated[str, _DECIDED] = "prompt"
    completion_field: Annotated[str, _DECIDED] = "completion"
    separator: Annotated[None, _DECIDED] = None
    max_length: Annotated[None, _DECIDED] = None
    init: Annotated[InitKind | None, _DECIDED] = None
    init_text: Annotated[None, _DECIDED] = None
    select_by: Annotated[Literal["loss"], _DECIDED] = "loss"

    num_virtual_tokens: Annotated[int | None, Parameter(group=_PREFIX)] = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Length P; 128, or a quarter of the document, if left out",
    )
    num_frozen_tokens: Annotated[int, Parameter(group=_PREFIX)] = Field(
        default=1, ge=0, description="Leading tokens of the prefix that stay as they begin"
    )

    @model_validator(mode="after")
    def _chunks_are_possible(self) -> DistillConfig:
        if self.min_chunk_tokens > self.max_chunk_tokens:
            raise ValueError(
                f"min_chunk_tokens: expected at most max_chunk_tokens ({self.max_chunk_tokens})"
            )
        return self
