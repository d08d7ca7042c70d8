"""How much memory the host has for this process: what is free, within the limits of the container around it.

Read at start by `server.model.device_memory` and `server.sizing`. Linux only, as everything here: /proc and the files of
control groups, of version 2 (one tree) and version 1 (a tree for memory alone).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class HostMemory:
    """`total_bytes` is the machine's or the container's, `available_bytes` what can be taken of it now."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class _Files:
    """How a version of control groups calls its files, and the entry of memory.stat for pages it can drop."""

    limit: str
    used: str
    droppable: str


_V2: Final = _Files("memory.max", "memory.current", "inactive_file")
_V1: Final = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """The least of what the machine and each control group around this process have."""
    total, available = _machine(proc)
    for folder, files in _groups(proc, cgroups):
        limit = _number(folder / files.limit)
        used = _number(folder / files.used)
        if limit is None or used is None:
            continue
        # Pages of files count as used until the limit is reached, and then go: a model that was just read is there.
        working_set = max(0, used - _droppable(folder / "memory.stat", files.droppable))
        total = min(total, limit)
        available = min(available, max(0, limit - working_set))
    return HostMemory(total, available)


def _machine(proc: Path) -> tuple[int, int]:
    fields = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024  # "kB" means KiB
    return fields["MemTotal"], fields["MemAvailable"]


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, _Files]]:
    """The group of this process and those around it, each with the names of its files."""
    listing = proc / "self" / "cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, files = cgroups, _V2
        elif "memory" in controllers.split(","):
            mount, files = cgroups / "memory", _V1
        else:
            continue
        # A container often sees the path of the host and, mounted, only its own group: then none but the mount is there.
        parts = [part for part in path.split("/") if part]
        depth = 0 if ".." in parts else len(parts)
        for end in range(depth, -1, -1):
            yield mount.joinpath(*parts[:end]), files


def _number(path: Path) -> int | None:
    """None: there is no such file, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _droppable(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(
        int(value) for key, _, value in (line.partition(" ") for line in lines) if key == name
    )
