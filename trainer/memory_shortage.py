"""Want of memory as an error with advice, whichever way torch says it. Called by `session` around a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import torch

from trainer.errors import NotEnoughMemory

# torch has no type of its own for the host's memory: these are the words of its allocator on Linux.
_HOST_WORDS: Final = ("can't allocate memory", "not enough memory")


@contextlib.contextmanager
def memory_shortage_named() -> Iterator[None]:
    """Turns what torch and Python raise for want of memory into `NotEnoughMemory`; everything else passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_shortage(error):
            raise
        said = str(error).partition("\n")[0] or "no memory left"
        raise NotEnoughMemory(
            f"{said}\nTry a smaller --micro-batch-size, which changes nothing else, --activation-checkpointing, "
            "or --max-length"
        ) from error


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _HOST_WORDS)
