"""What the machine could do at best, measured in the run whose results are held against it.

Two numbers bound a decode step. Every weight is read once per step, whatever the number of rows: the bytes
over the read bandwidth. Every weight is multiplied with every row: two operations each, over the speed of a
large matrix product. The larger of the two is the least time a step can take; reading the K/V comes on top,
since attention and the linear layers do not overlap.
"""

from __future__ import annotations

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

    def or_better(self, other: HardwareLimits) -> HardwareLimits:
        """A limit is what was reached at any time of the run."""
        return HardwareLimits(
            max(self.read_bytes_per_second, other.read_bytes_per_second),
            max(self.flops_per_second, other.flops_per_second),
        )


def measure_limits(
    dtype: torch.dtype, *, buffer_bytes: int = 2**29, matrix_size: int = 2048, tries: int = 8
) -> HardwareLimits:
    """Sums a buffer that no cache holds; multiplies square matrices in `dtype`."""
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32)
    left = torch.rand(matrix_size, matrix_size).to(dtype)
    right = torch.rand(matrix_size, matrix_size).to(dtype)
    return HardwareLimits(
        read_bytes_per_second=buffer.nbytes / _best(buffer.sum, tries),
        flops_per_second=2 * matrix_size**3 / _best(lambda: left @ right, tries),
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
