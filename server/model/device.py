"""Which device, and how much of its memory the KV pool may take.

Runs once at start; called by `server.bootstrap`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

from server.errors import ConfigError

# Of the memory that is free once the weights are loaded. The CPU shares its memory with everything else.
_CPU_SHARE: Final = 0.25
_CUDA_SHARE: Final = 0.85  # the rest is for activations and the allocator's slack


def pick_device(name: str) -> torch.device:
    """ "auto" takes CUDA where there is one. Raises `ConfigError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: {name} was asked for, but torch finds no CUDA device")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None


def available_bytes(device: torch.device) -> int:
    """Memory for the KV pool when no setting says how much."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE)
    return int(_available_host_bytes() * _CPU_SHARE)


def _available_host_bytes() -> int:
    """Free host memory, within the container's limit if there is one."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, max(0, int(text) - used))
    return free
