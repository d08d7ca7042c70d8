"""What the machine could do at best, measured in the run whose results are held against it.

Two numbers bound a decode step. Every weight is read once per step, whatever the number of rows: the bytes
over the read bandwidth. Every weight is multiplied with every row: two operations each, over the speed of a
large matrix product. The larger of the two is the least time a step can take; reading the K/V comes on top,
since attention and the linear layers do not overlap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class HardwareLimits:
    """Best of many tries, with the threads that the contestants have."""

    read_bytes_per_second: float
    flops_per_second: float


class LimitsMeter:
    """Sums a buffer that no cache holds, multiplies square matrices in `dtype`; keeps the best it ever saw.

    A machine shared with others (or a virtual one) has slow minutes, and its limit is what it can do in a
    good one. So measure often during a run, not once.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        buffer_bytes: int = 2**28,
        matrix_size: int = 2048,
        tries: int = 5,
    ) -> None:
        self._buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32)
        self._left = torch.rand(matrix_size, matrix_size).to(dtype)
        self._right = torch.rand(matrix_size, matrix_size).to(dtype)
        self._tries = tries
        self._read_seconds = math.inf
        self._multiply_seconds = math.inf

    def measure(self) -> None:
        """A few more tries: half a second."""
        read = _best(self._buffer.sum, self._tries)
        multiply = _best(lambda: self._left @ self._right, self._tries)
        self._read_seconds = min(self._read_seconds, read)
        self._multiply_seconds = min(self._multiply_seconds, multiply)

    def limits(self) -> HardwareLimits:
        return HardwareLimits(
            read_bytes_per_second=self._buffer.nbytes / self._read_seconds,
            flops_per_second=2 * self._left.shape[0] ** 3 / self._multiply_seconds,
        )


def _best(run: Callable[[], object], tries: int) -> float:
    """Seconds of the fastest run; the first one, which sets up, does not count."""
    run()
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a decode step must read and multiply. `multiplied_params`: those that meet every row."""

    num_params: int
    weight_bytes: int
    multiplied_params: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, model: nn.Module, kv_bytes_per_token: int) -> ModelCost:
        """An input embedding of its own (not tied to the output) is only looked up, never multiplied."""
        params = {id(p): p for p in model.parameters()}
        multiplied = dict(params)
        inputs = model.get_input_embeddings().weight  # type: ignore[operator]
        if model.get_output_embeddings().weight is not inputs:  # type: ignore[operator]
            del multiplied[id(inputs)]
        return cls(
            num_params=sum(p.numel() for p in params.values()),
            weight_bytes=sum(p.numel() * p.element_size() for p in multiplied.values()),
            multiplied_params=sum(p.numel() for p in multiplied.values()),
            kv_bytes_per_token=kv_bytes_per_token,
        )

    def step_seconds(self, limits: HardwareLimits, *, num_rows: int, kv_tokens: float) -> float:
        """The least time of a step of `num_rows` rows that attends over `kv_tokens` tokens in all."""
        read = self.weight_bytes / limits.read_bytes_per_second
        multiply = 2 * self.multiplied_params * num_rows / limits.flops_per_second
        kv = kv_tokens * self.kv_bytes_per_token / limits.read_bytes_per_second
        return max(read, multiply) + kv


def kv_bytes_per_token(model: nn.Module) -> int:
    """Keys and values of all layers, which are as wide as the layers that make them."""
    made = [m for name, m in model.named_modules() if name.endswith((".k_proj", ".v_proj"))]
    return sum(m.weight.shape[0] * m.weight.element_size() for m in made)
