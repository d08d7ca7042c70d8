"""What the doctor says: frozen, and pure. Made by the rules; shown by the report and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Severity(IntEnum):
    """How much it matters; a higher number is worse."""

    ADVICE = 1
    """The prefix is of use; a change would probably make a better one."""
    WARNING = 2
    """The prefix is not what it seems or could be."""
    ERROR = 3
    """The run failed at its purpose."""


class Failure(StrEnum):
    """The failure modes that the doctor knows. The values are stable: programs may compare them."""

    PREFIX_TOO_SHORT = "prefix_too_short"
    LEARNING_RATE_TOO_LOW = "learning_rate_too_low"
    LEARNING_RATE_TOO_HIGH = "learning_rate_too_high"
    TASK_MISMATCH = "task_mismatch"
    TEMPLATE_MISMATCH = "template_mismatch"
    NO_IMPROVEMENT = "no_improvement"
    OVERFITTING = "overfitting"
    NOT_A_NUMBER = "not_a_number"
    LOSS_SPIKES = "loss_spikes"
    EXPLODING_NORMS = "exploding_norms"
    DEAD_PREFIX = "dead_prefix"
    SINK_CAPTURED = "sink_captured"


@dataclass(frozen=True, slots=True)
class Finding:
    """One failure mode. `evidence`: a sentence with figures. `change`: what to do about it."""

    name: Failure
    severity: Severity
    evidence: str
    change: str

    @property
    def failed(self) -> bool:
        """Whether the run failed at its purpose for it."""
        return self.severity is Severity.ERROR
