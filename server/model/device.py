"""Which device, and what it means when it has no memory left: at start, and while it serves.

Called by `server.bootstrap` and `server.sizing` at start; `current` in every step; `memory_or_later` by bakes and trials, on the engine thread and workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from server.errors import CapacityError, ConfigError, EngineOverloaded


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


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU this thread's current one: kernels and events go there, whatever memory they are given."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def memory_or_later(purpose: str) -> Iterator[None]:
    """Memory that is short now may be there later: raises `EngineOverloaded` then; running requests go on.

    For work outside of the KV pool. A CPU's allocator raises a plain `RuntimeError`.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise EngineOverloaded(
            f"there is not enough memory {purpose} now; try again later"
        ) from None


@contextlib.contextmanager
def memory_or_refused(purpose: str, remedy: str) -> Iterator[None]:
    """Memory that is short at start will not come: raises `CapacityError` with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise CapacityError(f"there is not enough memory {purpose}: {remedy}") from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError, which is a `RuntimeError`, or the plain one of the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
