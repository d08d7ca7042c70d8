"""A soft prompt: learned rows in the place of token embeddings, which one prefill turns into a prefix.

Made by `importers.peft` on any thread; baked by the server on the engine thread, because that takes the
resident model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefix_store.errors import ImportRefused
from prefix_store.importers.recognition import Provenance


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """`embeddings`: `[P, hidden]`, float32, finite."""

    embeddings: Tensor
    provenance: Provenance

    @property
    def num_virtual_tokens(self) -> int:
        return int(self.embeddings.shape[0])


def checked_embeddings(embeddings: Tensor, max_abs_value: float) -> Tensor:
    """As contiguous float32. Raises `ImportRefused` for values that the model could not compute with."""
    pointer = "/tensors/prompt_embeddings"
    if not embeddings.isfinite().all():
        raise ImportRefused.at(pointer, "the soft prompt holds NaN or infinity")
    largest = float(embeddings.abs().max())
    if largest > max_abs_value:
        raise ImportRefused.at(
            pointer,
            f"the soft prompt holds a value of magnitude {largest:g}, expected at most {max_abs_value:g}",
        )
    return embeddings.to(torch.float32).contiguous()
