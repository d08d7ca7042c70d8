"""Records of runs that never happened: a sane one, and any change to it that a test wants."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NUM_LAYERS = 4
NATURAL = [4.0, 9.0, 11.0, 12.0]


def settling(first: float, last: float, pace: float = 6.0) -> Callable[[float], float]:
    """A loss that falls from `first` to `last` over a run, as a function of the share of steps done."""
    return lambda done: last + (first - last) * math.exp(-pace * done)


SOLVED_TRAINING = settling(8.0, 0.05)
SOLVED_HELD_OUT = settling(7.8, 0.06)


@dataclass
class SyntheticRun:
    """What varies between the runs of the tests. Losses by the share of steps done, layers by first and last."""

    num_steps: int = 200
    num_evaluations: int = 10
    train: Callable[[float], float] = SOLVED_TRAINING
    held: Callable[[float], float] = SOLVED_HELD_OUT
    gap: tuple[float, float] | None = (3.5, 4.0)
    gap_error: float = 0.0
    noise: float = 0.02
    learning_rate: float = 5e-3
    key_growth: float = 1.1
    key_start: float = 1.0
    attention: tuple[float, float] = (0.15, 0.4)
    sink: tuple[float, float] = (0.01, 0.02)
    moved: float = 0.4
    metrics: dict[str, float] | None = None
    warnings: Sequence[str] = ()
    end: str | None = "finished"
    num_virtual_tokens: int = 16
    base_loss: float | None = 7.9

    @property
    def config(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens, "clip_norm": 1.0}

    def records(self) -> list[dict[str, Any]]:
        rng = random.Random(3)
        records = [self._begin(), *self._warnings(), *self._evaluation(0)]
        every = self.num_steps // self.num_evaluations
        for step in range(1, self.num_steps + 1):
            loss = self.train(step / self.num_steps) * math.exp(rng.gauss(0.0, self.noise))
            records.append(self._step(step, loss))
            if step % every == 0:
                records += self._evaluation(step)
        if self.end is not None:
            records.append(self._end(self.end))
        return records

    def _begin(self) -> dict[str, Any]:
        lengths = {"min": 2, "median": 10, "p95": 20, "max": 30}
        return {
            "kind": "begin",
            "step": 0,
            "num_steps": self.num_steps,
            "num_parameters": 18_432,
            "num_training": 1_000,
            "num_held_out": 32,
            "num_prompts": 1_000,
            "num_completion_tokens": 10_000,
            "num_virtual_tokens": self.num_virtual_tokens,
            "training_tokens": {"prompt": lengths, "completion": lengths},
            "held_out_tokens": {"prompt": lengths, "completion": lengths},
            "base_loss": self.base_loss,
        }

    def _warnings(self) -> list[dict[str, Any]]:
        return [
            {"kind": "warning", "code": code, "message": f"about {code}"} for code in self.warnings
        ]

    def _step(self, step: int, loss: float) -> dict[str, Any]:
        return {
            "kind": "step",
            "step": step,
            "loss": loss,
            "learning_rate": self.learning_rate,
            "grad_norm": 0.5,
            "num_tokens": 80,
            "tokens_per_second": 400.0,
            "seconds": 0.2 * step,
        }

    def _evaluation(self, step: int) -> list[dict[str, Any]]:
        done = step / self.num_steps
        held: dict[str, Any] = {"kind": "held_out", "step": step, "loss": self.held(done)}
        if self.gap is not None and step in (0, self.num_steps):
            held["loss_other_prompt"] = held["loss"] + self.gap[step > 0]
            held["loss_other_prompt_error"] = self.gap_error
        return [held | (self.metrics or {}), self._prefix(step, done)]

    def _prefix(self, step: int, done: float) -> dict[str, Any]:
        def between(ends: tuple[float, float]) -> list[float]:
            return [ends[0] + done * (ends[1] - ends[0])] * NUM_LAYERS

        factor = self.key_start * self.key_growth**done
        return {
            "kind": "prefix",
            "step": step,
            "key_norms": [factor * norm for norm in NATURAL],
            "value_norms": NATURAL,
            "natural_key_norms": NATURAL,
            "natural_value_norms": NATURAL,
            "attention_mass": between(self.attention),
            "sink_mass": between(self.sink),
            "moved_keys": [done * self.moved] * NUM_LAYERS,
            "moved_values": [done * self.moved / 2] * NUM_LAYERS,
        }

    def _end(self, reason: str) -> dict[str, Any]:
        return {
            "kind": "end",
            "reason": reason,
            "best_step": self.num_steps,
            "best_loss": self.held(1.0),
            "seconds": 0.2 * self.num_steps,
        }
