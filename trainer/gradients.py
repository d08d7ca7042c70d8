"""The gradients of one step, over as many forward passes as fit into memory. Main thread; called by `loop`.

The encoder runs once a step. Its output is a leaf for the passes, which add up their gradients there, and only then
does the encoder's own backward pass run: its cost, and its dropout, do not depend on how a step is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trainer.base import FrozenBase
from trainer.batches import make_batch
from trainer.encoding import EncodedExample
from trainer.loss import Objective
from trainer.prefix_cache import KeyValues
from trainer.prefix_encoder import PrefixEncoder


@dataclass(frozen=True, slots=True)
class StepLoss:
    """`mean`: of the loss over the completion tokens, whatever was minimised. `num_tokens`: fed, without padding."""

    mean: float
    num_tokens: int


def add_gradients(
    base: FrozenBase,
    encoder: PrefixEncoder,
    examples: Sequence[EncodedExample],
    *,
    rows: int,
    reduction: Literal["mean", "sum"],
    objective: Objective,
) -> StepLoss:
    """Adds the gradient of the loss of `examples`, `rows` of them in a pass, to the encoder's parameters.

    `reduction` mean: over all completion tokens of the step. sum: over each example's tokens, mean over examples.
    """
    prefix = encoder()
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in prefix.tensors]
    num_targets = sum(len(example.completion_token_ids) for example in examples)
    divisor = num_targets if reduction == "mean" else len(examples)
    total, num_tokens = 0.0, 0
    for start in range(0, len(examples), rows):
        batch = make_batch(examples[start : start + rows], base.device)
        loss = objective(base.logits(KeyValues.of(leaves), batch), batch)
        (loss / divisor).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        num_tokens += batch.num_tokens
    pairs = [(o, leaf.grad) for o, leaf in zip(prefix.tensors, leaves, strict=True)]
    seen = [(output, gradient) for output, gradient in pairs if gradient is not None]
    torch.autograd.backward([o for o, _ in seen], [g for _, g in seen])
    return StepLoss(total / num_targets, num_tokens)
