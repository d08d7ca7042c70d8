"""Brings prefixes to a GPU while the engine runs its steps: from pinned host memory, on a stream of its own.

`Staging.stage` runs on the prefetch workers, where the device has memory of its own, between the store and the engine. A cold prefix then costs its own request one transfer. The engine thread, and with it everybody else, pays only
for copying it within the device, from where it was staged into the blocks that the scheduler found for it.

`pack` is given to the store, so that what it keeps in host memory can be fetched without another copy.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor

from prefix_store.artifact import Prefix

logger = logging.getLogger(__name__)

STAGING_BYTES: Final = 512 * 2**20
"""Of the device, for prefixes on their way: two of 2,048 tokens for an 8B model."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedPrefix(Prefix):
    """A prefix whose tensors are views of one buffer [bytes], which is moved in one transfer."""

    buffer: Tensor

    @property
    def num_bytes(self) -> int:
        """What it holds of host memory: torch takes pinned memory in powers of two."""
        size: int = self.buffer.nbytes
        return 1 << (size - 1).bit_length() if self.buffer.is_pinned() else size

    def moved_to(self, buffer: Tensor) -> PackedPrefix:
        """The same prefix in another buffer that has the same bytes."""
        tensors = _views(buffer, (*self.keys, *self.values))
        count = len(self.keys)
        return PackedPrefix(self.digest, self.manifest, tensors[:count], tensors[count:], buffer)


def pack(prefix: Prefix, *, pinned: bool) -> PackedPrefix:
    """`prefix` in one buffer, which a GPU can fetch by itself if it is pinned; itself if it is so already."""
    if isinstance(prefix, PackedPrefix):
        return prefix
    tensors = (*prefix.keys, *prefix.values)
    size = sum(tensor.nbytes for tensor in tensors)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    views = _views(buffer, tensors)
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    count = len(prefix.keys)
    return PackedPrefix(prefix.digest, prefix.manifest, views[:count], views[count:], buffer)


def _views(buffer: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors of the shapes and types of `like`, one behind the other in `buffer` [bytes]."""
    ends = accumulate((tensor.nbytes for tensor in like), initial=0)
    return tuple(
        buffer[start:stop].view(tensor.dtype).view(tensor.shape)
        for tensor, (start, stop) in zip(like, pairwise(ends), strict=True)
    )


class Staging:
    """Room on the device for prefixes on their way to their blocks. Thread-safe.

    Of `num_bytes` each staged prefix takes its part until nobody holds it any more. One that finds no room, or no memory, is
    handed over in host memory: the step that writes it waits for the transfer, and nothing else is different.
    """

    def __init__(self, device: torch.device, num_bytes: int = STAGING_BYTES) -> None:
        self._device = device
        self._stream = _new_stream(device) if device.type == "cuda" else None
        self._room = _Room(num_bytes)

    def stage(self, prefix: Prefix) -> Prefix:
        """The prefix on the device. Blocks until it is there."""
        packed = pack(prefix, pinned=self._stream is not None)
        size = packed.buffer.nbytes
        if not self._room.take(size):
            return packed
        try:
            staged = packed.moved_to(self._transferred(packed.buffer))
        except BaseException as error:
            self._room.give_back(size)
            if isinstance(error, torch.OutOfMemoryError):
                logger.warning("no device memory to stage a prefix of %d bytes", size)
                return packed
            raise
        weakref.finalize(staged, self._room.give_back, size)
        return staged

    def _transferred(self, buffer: Tensor) -> Tensor:
        """A copy on the device, complete when this returns. Only this thread waits for it."""
        if self._stream is None:
            return buffer.clone()
        with torch.cuda.stream(self._stream):
            copy = buffer.to(self._device, non_blocking=True)
            arrived = self._stream.record_event()
        arrived.synchronize()
        return copy


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch has no annotations there


class _Room:
    """Bytes that may be taken, counted. Any thread."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._lock = threading.RLock()  # a finalizer may come in between, on this very thread

    def take(self, num_bytes: int) -> bool:
        """Whether there was room for so many; they are the caller's then."""
        with self._lock:
            if num_bytes > self._left:
                return False
            self._left -= num_bytes
            return True

    def give_back(self, num_bytes: int) -> None:
        with self._lock:
            self._left += num_bytes
