"""What the doctor is told of the data and the settings, apart from the records. Frozen and pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DataSummary:
    """The data of a run. None: not known; rules that need it are silent then.

    `base_loss`: held-out loss of the base without a prefix, nats a token. `num_completion_tokens`: of all training
    examples, each counted once; `prompt_len`, `completion_len`: of the median one. `num_prompts`: different prompts among them.
    """

    num_training: int | None = None
    num_prompts: int | None = None
    num_completion_tokens: int | None = None
    prompt_len: float | None = None
    completion_len: float | None = None
    base_loss: float | None = None

    @classmethod
    def of(cls, begin: Mapping[str, Any]) -> DataSummary:
        """From a run's first record."""
        lengths = begin.get("training_tokens") or {}
        return cls(
            num_training=begin.get("num_training"),
            num_prompts=begin.get("num_prompts"),
            num_completion_tokens=begin.get("num_completion_tokens"),
            prompt_len=lengths.get("prompt", {}).get("median"),
            completion_len=lengths.get("completion", {}).get("median"),
            base_loss=begin.get("base_loss"),
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """What the doctor judges by, apart from the data. None: not known."""

    num_virtual_tokens: int | None
    num_parameters: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any], begin: Mapping[str, Any]) -> Settings:
        """As the run found them where it says so: a setting that was left out is null in `config`."""
        return cls(
            num_virtual_tokens=begin.get("num_virtual_tokens") or config.get("num_virtual_tokens"),
            num_parameters=begin.get("num_parameters"),
        )
