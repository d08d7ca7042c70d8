"""The learning rate of each step: a pure function, so that a resumed run needs no state of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

Shape: TypeAlias = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Rises linearly to `peak` over `warmup_steps`, then falls to 0 at `num_steps`, or stays."""

    peak: float
    num_steps: int
    warmup_steps: int
    shape: Shape = "cosine"

    def learning_rate(self, step: int) -> float:
        """Of step `step`, which counts from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.num_steps - self.warmup_steps, 1)
        match self.shape:
            case "cosine":
                return self.peak * 0.5 * (1.0 + math.cos(math.pi * done))
            case "linear":
                return self.peak * (1.0 - done)
            case "constant":
                return self.peak
