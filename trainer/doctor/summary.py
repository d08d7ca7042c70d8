"""What the doctor is told of the data and the settings, apart from the records. Frozen and pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DataSummary:
    """The data of a run. None: not known; rules that need it are silent then.

    `base_loss`: held-out loss of the base without a prefix, nats a token. `num_completion_tokens`: of all training
    examples, each counted once. `num_prompts`: different prompts among the training examples.
    """

    num_train: int | None = None
    num_prompts: int | None = None
    num_completion_tokens: int | None = None
    completion_len: float | None = None
    base_loss: float | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> DataSummary:
        """From a JSON object; unknown fields are passed over, so that its writer may say more."""
        known = {
            name: found[name] for name in cls.__dataclass_fields__ if found.get(name) is not None
        }
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that the doctor judges by. None: not known."""

    num_virtual_tokens: int | None
    learning_rate: float | None
    num_parameters: int | None
    clip_norm: float | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        return cls(**{name: config.get(name) for name in cls.__dataclass_fields__})
