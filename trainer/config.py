"""The settings of one training run, frozen and checked; written to the run folder as they were used.

Each field is a flag of `prefixd train` and an argument of `TrainConfig(...)`. Built by `cli_train` or by a program;
reads no environment. Errors are `BadSetting`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from cyclopts import Group, Parameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prefix_store.spec import StopString
from trainer.errors import BadSetting
from trainer.schedule import Shape

DEFAULT_NUM_VIRTUAL_TOKENS: Final = 16
DEFAULT_NUM_EPOCHS: Final = 3
MIN_DEFAULT_STEPS: Final = 800
DEFAULT_NUM_EVALUATIONS: Final = 10
DEFAULT_LEARNING_RATES: Final = {"direct": 5e-2, "mlp": 5e-3, "soft": 5e-2}
"""Direct keys and values are learned in units of their initial size, so 5e-2 is a twentieth of it a step.
Measured on the demo's tasks: docs/lab-log.md."""
LOSS: Final = "loss"
MAX_SEED: Final = (
    2**53
)  # the artifact's training record has it as JSON, whose integers are exact up to there

InitKind: TypeAlias = Literal["text", "examples", "vocabulary", "random"]

_MODEL: Final = Group.create_ordered("Base model")
_DATA: Final = Group.create_ordered("Data")
_PREFIX: Final = Group.create_ordered("Prefix")
_PREFIX_DETAILS: Final = Group.create_ordered("Prefix, in detail")
_STEPS: Final = Group.create_ordered("Optimisation")
_RUN: Final = Group.create_ordered("Run")


class RunSettings(BaseModel):
    """The settings that all runs of a sweep share. Raises `BadSetting`, never pydantic's error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Annotated[str | None, Parameter(group=_MODEL)] = Field(
        default=None, description="Hugging Face id or folder; the bundled demo model if left out"
    )
    revision: Annotated[str | None, Parameter(group=_MODEL)] = Field(
        default=None, description="Branch, tag or commit of the model"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Parameter(group=_MODEL)] = Field(
        default="auto",
        description="Of the base's weights; auto: float32 on a CPU, bfloat16 on a GPU for weights in half precision",
    )
    device: Annotated[str, Parameter(group=_MODEL)] = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$",
        description="auto, cpu, cuda or cuda:N",
    )
    num_threads: Annotated[int | None, Parameter(group=_MODEL)] = Field(
        default=None, ge=1, le=1024, description="CPU threads; torch's choice if left out"
    )

    data: Annotated[Path, Parameter(group=_DATA)] = Field(
        description="JSONL with prompt and completion, or messages, in each line; or CSV"
    )
    held_out: Annotated[Path | None, Parameter(group=_DATA)] = Field(
        default=None,
        description="Held-out examples in the same form; a part of the data if left out",
    )
    held_out_fraction: Annotated[float, Parameter(group=_DATA)] = Field(
        default=0.1, gt=0, lt=1, description="That part"
    )
    split_seed: Annotated[int, Parameter(group=_DATA)] = Field(
        default=0, ge=0, description="Which part; apart from the seed, so that runs can be compared"
    )
    prompt_field: Annotated[str, Parameter(group=_DATA)] = Field(
        default="prompt", min_length=1, description="Key or column of the prompt"
    )
    completion_field: Annotated[str, Parameter(group=_DATA)] = Field(
        default="completion", min_length=1, description="Key or column of the completion"
    )
    separator: Annotated[str | None, Parameter(group=_DATA)] = Field(
        default=None,
        max_length=1024,
        description="Learned before each completion; a space if there is no white space at any joint",
    )
    stop: Annotated[tuple[StopString, ...], Parameter(group=_DATA, negative=())] = Field(
        default=(), max_length=4, description="Stop string that the task is served with"
    )
    max_length: Annotated[int | None, Parameter(group=_DATA)] = Field(
        default=None,
        ge=2,
        description="Leave out examples of more tokens; those that do not fit the model if left out",
    )

    num_frozen_tokens: Annotated[int, Parameter(group=_PREFIX_DETAILS)] = Field(
        default=0, ge=0, description="Leading tokens of the prefix that stay as they begin"
    )
    prefix_dropout: Annotated[float, Parameter(group=_PREFIX_DETAILS)] = Field(
        default=0.0, ge=0, lt=1, description="Share of the prefix's values that a step leaves out"
    )
    mlp_embedding_size: Annotated[int, Parameter(group=_PREFIX_DETAILS)] = Field(
        default=64, ge=1, le=65_536, description="Width of the MLP's input"
    )
    mlp_hidden_size: Annotated[int, Parameter(group=_PREFIX_DETAILS)] = Field(
        default=128, ge=1, le=65_536, description="Width of its hidden layer"
    )

    num_steps: Annotated[int | None, Parameter(group=_STEPS)] = Field(
        default=None, ge=1, description="Optimizer steps; by --num-epochs if left out"
    )
    num_epochs: Annotated[float | None, Parameter(group=_STEPS)] = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Passes over the data; 3, and at least 800 steps, if neither is given",
    )
    batch_size: Annotated[int, Parameter(group=_STEPS)] = Field(
        default=16, ge=1, description="Examples of a step"
    )
    micro_batch_size: Annotated[int | None, Parameter(group=_STEPS)] = Field(
        default=None,
        ge=1,
        description="Examples of a forward pass; gradients accumulate over a step's passes",
    )
    schedule: Annotated[Shape, Parameter(group=_STEPS)] = Field(
        default="cosine", description="How it falls"
    )
    warmup_fraction: Annotated[float, Parameter(group=_STEPS)] = Field(
        default=0.06, ge=0, lt=1, description="Share of the steps in which it rises"
    )
    weight_decay: Annotated[float, Parameter(group=_STEPS)] = Field(
        default=0.0, ge=0, description="AdamW's, on all parameters"
    )
    clip_norm: Annotated[float | None, Parameter(group=_STEPS)] = Field(
        default=1.0, gt=0, description="Largest gradient norm of a step"
    )
    loss: Annotated[Literal["mean", "sum"], Parameter(group=_STEPS)] = Field(
        default="mean",
        description="mean over a step's tokens; sum over each example's, mean over examples",
    )
    activation_checkpointing: Annotated[bool, Parameter(group=_STEPS, negative=())] = Field(
        default=False, description="Less memory, about a third more time"
    )

    output: Annotated[Path, Parameter(group=_RUN)] = Field(
        description="Run folder, which must not exist yet or be empty"
    )
    evaluate_every: Annotated[int | None, Parameter(group=_RUN)] = Field(
        default=None, ge=1, description="Steps between evaluations; a tenth of the run if left out"
    )
    checkpoint_every: Annotated[int | None, Parameter(group=_RUN)] = Field(
        default=None, ge=1, description="Steps between checkpoints; at evaluations if left out"
    )
    patience: Annotated[int | None, Parameter(group=_RUN)] = Field(
        default=None, ge=1, description="End after so many evaluations without a better one"
    )
    select_by: Annotated[str, Parameter(group=_RUN)] = Field(
        default=LOSS, min_length=1, description="What the best is best by: loss, or a metric's name"
    )
    description: Annotated[str | None, Parameter(group=_RUN)] = Field(
        default=None, max_length=1024, description="Of the task; shown where prefixes are listed"
    )
    artifact_dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], Parameter(group=_RUN)
    ] = Field(
        default="auto", description="Of prefix.safetensors; auto: the one that the base ran in"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise BadSetting(_describe(error)) from None

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Self:
        if self.num_steps is not None and self.num_epochs is not None:
            raise ValueError("num_steps: expected either this or num_epochs")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size: expected at most batch_size ({self.batch_size})")
        return self

    def num_steps_for(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.num_steps is not None:
            return self.num_steps
        if self.num_epochs is None:
            return max(MIN_DEFAULT_STEPS, DEFAULT_NUM_EPOCHS * steps_per_epoch)
        return max(1, round(self.num_epochs * steps_per_epoch))


@Parameter(name="*")
class TrainConfig(RunSettings):
    """The settings of `prefixd train`: those above, and those that a sweep varies."""

    encoder: Annotated[Literal["direct", "mlp", "soft"], Parameter(group=_PREFIX)] = Field(
        default="direct",
        description="direct: keys and values; mlp: through an MLP; soft: input embeddings",
    )
    num_virtual_tokens: Annotated[int | None, Parameter(group=_PREFIX)] = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Length P; 16, or that of the initial text, if left out",
    )
    init: Annotated[InitKind | None, Parameter(group=_PREFIX)] = Field(
        default=None,
        description="What the prefix begins as; text if --init-text is given, else examples",
    )
    init_text: Annotated[str | None, Parameter(group=_PREFIX)] = Field(
        default=None, min_length=1, description="The text that it begins as, such as an instruction"
    )
    learning_rate: Annotated[float | None, Parameter(group=_STEPS)] = Field(
        default=None, gt=0, description="Peak; by the encoder if left out"
    )
    seed: Annotated[int, Parameter(group=_RUN)] = Field(
        default=0, ge=0, lt=MAX_SEED, description="Of initialisation, order and dropout"
    )

    @model_validator(mode="after")
    def _init_fits_text(self) -> Self:
        if self.init == "text" and self.init_text is None:
            raise ValueError("init: text needs init_text")
        if self.init not in (None, "text") and self.init_text is not None:
            raise ValueError(f"init_text: expected no text with init {self.init}")
        return self

    @property
    def init_kind(self) -> InitKind:
        """`init`, or what follows from `init_text`."""
        return self.init or ("examples" if self.init_text is None else "text")

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the encoder's own."""
        return self.learning_rate or DEFAULT_LEARNING_RATES[self.encoder]


def _describe(error: ValidationError) -> str:
    """One line per bad setting."""
    lines = []
    for fault in error.errors(include_url=False, include_context=False):
        message = fault["msg"].removeprefix("Value error, ")
        name = ".".join(map(str, fault["loc"]))
        got = f" (got {str(fault['input'])[:80]!r})" if name and fault["type"] != "missing" else ""
        lines.append(f"{name}: {message}{got}" if name else message)
    return "\n".join(lines)
