"""How many bytes of tensors a computation holds at once, counted as torch's operators make and drop them.

Used at start, on the main thread, by `server.model.device_memory` for the CPU, whose allocator keeps no peak. The process'
own size would not do: memory that was freed earlier is used again without it growing. Not counted is what a
kernel takes and gives back inside of one call.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorBytes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch has no types for it
    """`peak_bytes`: the most that lived at once of what was made inside `with`. One storage counts once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,  # torch's operators have no types
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        for leaf in tree_iter((args, given)):
            if _has_storage(leaf):
                self._take_in(leaf, made=False)  # was there before: weights, and the KV pool
        made = func(*args, **given)
        for leaf in tree_iter(made):
            if _has_storage(leaf):
                self._take_in(leaf, made=True)
        return made

    def _take_in(self, tensor: Tensor, *, made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        num_bytes = storage.nbytes() if made else 0
        self._known.add(key)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key, num_bytes).atexit = False

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes


def _has_storage(value: object) -> TypeGuard[Tensor]:
    """Not what oneDNN keeps in a layout of its own: weights, which nothing in a step makes."""
    return isinstance(value, Tensor) and value.layout == torch.strided
