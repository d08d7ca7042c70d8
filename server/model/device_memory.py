"""What memory a device has and what a step takes of it, asked of CUDA's allocator or counted for the CPU.

Made by `server.sizing` before the model is loaded, so that what was taken by others then is known; used on the main thread until
the engine starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

from server.errors import CapacityError
from server.kvcache.memory_account import MemoryAccount, MemoryUse, readable
from server.model.host_memory import HostMemory, host_memory
from server.model.tensor_bytes import TensorBytes

# Of the host's memory that is free with the weights loaded. The machine has other things to do, and what has no line
# in the account comes out of the rest: kernels' scratch, prefixes on their way to the device, pages of files.
CPU_SHARE: Final = 0.5
# A process grows by more than its tensors: blocks that the C library can not join, and scratch inside of kernels. Measured were
# 1.3 and 1.6 times as much (lab log, 2026-11-24).
_GROWTH: Final = 2
UTILIZATION: Final = "--gpu-memory-utilization"


class DeviceMemory(Protocol):
    """The memory of the device that serves."""

    def peak_of(self, run: Callable[[], object]) -> int:
        """Bytes that `run` takes at most, beside what is held before."""

    def account(self, uses: tuple[MemoryUse, ...]) -> MemoryAccount:
        """The account of now, with the weights loaded, and these uses in it."""


class CudaMemory:
    """A GPU, by its allocator. `cuda` is `torch.cuda`, or a double in tests."""

    def __init__(self, device: torch.device, utilization: float, cuda: Any = torch.cuda) -> None:
        """Raises `CapacityError` when others hold so much that the share can not be had."""
        self._device = device
        self._share = utilization
        self._cuda = cuda
        self._total, self._outside_at_start = self._outside()
        free, wanted = self._total - self._outside_at_start, int(self._total * utilization)
        if free < wanted:
            raise CapacityError(
                f"{device} has {readable(free)} free of {readable(self._total)}, and {UTILIZATION} "
                f"{utilization:g} asks for {readable(wanted)}: lower it, or end what holds the rest"
            )

    def peak_of(self, run: Callable[[], object]) -> int:
        """What the allocator takes from the device, so that blocks which it can not join count too."""
        self._cuda.synchronize(self._device)
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats(self._device)
        before = self._cuda.memory_allocated(self._device)
        run()
        self._cuda.synchronize(self._device)
        peak = self._cuda.max_memory_reserved(self._device) - before
        self._cuda.empty_cache()
        return max(0, int(peak))

    def account(self, uses: tuple[MemoryUse, ...]) -> MemoryAccount:
        """As vLLM: of all the device's memory. What others hold is not ours to count, only what came since the start."""
        weights = MemoryUse("weights", self._cuda.memory_allocated(self._device), "--dtype")
        _, outside = self._outside()
        grown = MemoryUse("outside of torch", max(0, outside - self._outside_at_start))
        lines = (weights, *uses, grown)
        name = f"memory of {self._device}"
        return MemoryAccount(name, self._total, self._share, lines, UTILIZATION)

    def _outside(self) -> tuple[int, int]:
        """All of the device's memory, and what of it is neither free nor the allocator's."""
        free, total = self._cuda.mem_get_info(self._device)
        return int(total), int(total - free - self._cuda.memory_reserved(self._device))


class CpuMemory:
    """The host, within its container. `read` is `host_memory`, or a double in tests."""

    def __init__(self, read: Callable[[], HostMemory] = host_memory) -> None:
        self._read = read

    def peak_of(self, run: Callable[[], object]) -> int:
        """The tensors that live at once, and as much again for what the process takes around them."""
        counted = TensorBytes()
        with counted:
            run()
        return _GROWTH * counted.peak_bytes

    def account(self, uses: tuple[MemoryUse, ...]) -> MemoryAccount:
        """Of what is free now: the weights, loaded, are not in it."""
        name = "free memory, weights loaded"
        return MemoryAccount(name, self._read().available_bytes, CPU_SHARE, uses)
