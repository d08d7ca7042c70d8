"""The records of a training run: what `log.jsonl` holds, one JSON object a line, in the order of events.

The loop makes them and hands each to its observers; the live table, the plots, the report and the doctor know a
run by its records alone, so all of them work on a finished run folder as on a running one. Pure, on any thread.

Losses are nats a completion token. Norms are mean L2 norms in one layer, attention masses mean probabilities over
the completion tokens, both one number a layer. Generated metrics are percentages, as the evaluation gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, Protocol, TypeAlias, TypedDict

from trainer.errors import TrainerError

Record: TypeAlias = Mapping[str, Any]
"""Any line of the log. Kinds and fields that a reader does not know are passed over, not refused."""

LOSS_OTHER_PROMPT: Final = "loss_other_prompt"
LOSS_OTHER_PROMPT_ERROR: Final = "loss_other_prompt_error"
_WITH_STEP: Final = frozenset({"step", "held_out", "prefix"})
NOT_METRICS: Final = frozenset(
    {"kind", "step", "loss", "seconds", LOSS_OTHER_PROMPT, LOSS_OTHER_PROMPT_ERROR}
)


class MalformedLog(TrainerError):
    """A line of a run's log is no record; the message has the file and the line."""


class BeginRecord(TypedDict):
    """The first line, and again after a resumption: what the run works on.

    `step`: steps done before. `training_tokens`: of prompts and completions, `min`, `median`, `p95`, `max`.
    `base_loss`: held-out loss without a prefix. `num_prompts`: different ones among the training examples.
    """

    kind: Literal["begin"]
    step: int
    num_steps: int
    num_parameters: int
    num_training: int
    num_held_out: int
    training_tokens: dict[str, dict[str, int]]
    held_out_tokens: dict[str, dict[str, int]]
    num_virtual_tokens: NotRequired[int]
    num_prompts: NotRequired[int]
    num_completion_tokens: NotRequired[int]
    base_loss: NotRequired[float]


class StepRecord(TypedDict):
    """One optimizer step. `seconds` since the run began, `grad_norm` before clipping, `num_tokens` fed to the base."""

    kind: Literal["step"]
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    tokens_per_second: float
    seconds: float


class HeldOutRecord(TypedDict):
    """Loss on the held-out data after `step` steps (0: before the first); generated metrics stand beside it.

    `loss_other_prompt`: the same with each completion behind another example's prompt. Where it is no higher
    than `loss`, the completions do not depend on their prompts; `loss_other_prompt_error` is the standard error of
    the difference. Measured before the first step and at the end.
    """

    kind: Literal["held_out"]
    step: int
    loss: float
    loss_other_prompt: NotRequired[float]
    loss_other_prompt_error: NotRequired[float]


class PrefixRecord(TypedDict):
    """What the prefix is like after `step` steps, one number a layer.

    `moved_keys`, `moved_values`: L2 distance from the initial prefix over the initial prefix's own norm.
    """

    kind: Literal["prefix"]
    step: int
    key_norms: list[float]
    value_norms: list[float]
    natural_key_norms: list[float]
    natural_value_norms: list[float]
    attention_mass: list[float]
    sink_mass: list[float]
    moved_keys: NotRequired[list[float]]
    moved_values: NotRequired[list[float]]


class WarningRecord(TypedDict):
    """Something the user should know: `message` a sentence, `code` a word for programs."""

    kind: Literal["warning"]
    code: NotRequired[str]
    message: str


class EndRecord(TypedDict):
    """The last line of a run that ended by itself: finished, no improvement, or diverged (no finite loss any more)."""

    kind: Literal["end"]
    reason: str
    best_step: int
    best_loss: float | None
    seconds: float


class Observer(Protocol):
    """Is told each record as it is made, on the loop's thread. Must not raise and not be slow."""

    def on_record(self, record: Record) -> None: ...


def read_records(path: Path) -> list[Record]:
    """The records of a log, oldest first. Raises `MalformedLog`.

    A last line without its end is what a killed run leaves behind: it is passed over.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise MalformedLog(f"{path}: {error.strerror}") from None
    whole = lines[:-1]  # what stands behind the last newline is nothing, or torn
    return [_record(path, number, line) for number, line in enumerate(whole, 1) if line.strip()]


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise MalformedLog(f"{path}, line {number}: expected a JSON object; {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise MalformedLog(f"{path}, line {number}: expected an object with a `kind`")
    _require_fields(path, number, found)
    return found


def _require_fields(path: Path, number: int, record: Record) -> None:
    """What every reader takes for granted; all else may be missing. `type`, because True is an int too."""
    kind = record["kind"]
    if kind in _WITH_STEP and type(record.get("step")) is not int:
        missing = "a whole number as `step`"
    elif kind == "end" and not isinstance(record.get("reason"), str):
        missing = "a text as `reason`"
    else:
        return
    raise MalformedLog(f"{path}, line {number}: expected {missing} in a record of kind {kind!r}")
