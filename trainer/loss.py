"""What is minimised: by default the negative log-likelihood of the completions' tokens. Pure; called by `loop`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.batches import Batch


class Objective(Protocol):
    """A loss summed over the completion tokens of a batch: `logits` is [N, V], one row a target."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor: ...


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Nats, summed over all completion tokens."""
    return cross_entropy(widened(logits), batch.targets, reduction="sum")


def widened(logits: Tensor) -> Tensor:
    """At least float32: a softmax over a vocabulary in half precision loses what is learned from."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
