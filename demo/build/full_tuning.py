"""Full fine-tuning of the base on one task: the measure of what its prefix could reach.

Called by ``measure``, on a base of its own. Data order, schedule, optimizer and loss are the trainer's; what differs
is what is trained.
"""

import logging
import math
from collections.abc import Sequence
from typing import Final

import torch

from trainer.base import FrozenBase
from trainer.batches import DataOrder, make_batch
from trainer.encoding import EncodedExample
from trainer.loop import ADAM_BETAS
from trainer.loss import next_token_loss
from trainer.schedule import Schedule

log = logging.getLogger(__name__)

NUM_STEPS: Final = 400  # enough: it is at its end long before
LEARNING_RATE: Final = 5e-4
BATCH: Final = 16
WARMUP_FRACTION: Final = 0.06
CLIP_NORM: Final = 1.0
LOG_STEPS: Final = 100


def fine_tune(
    base: FrozenBase,
    training: Sequence[EncodedExample],
    *,
    num_steps: int = NUM_STEPS,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Trains all parameters of ``base`` in place."""
    module = base.module.requires_grad_(True)  # eval mode stays: the base has no dropout
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=True
    )
    order = DataOrder([example.num_tokens for example in training], BATCH, seed)
    schedule = Schedule(learning_rate, num_steps, math.ceil(WARMUP_FRACTION * num_steps))
    recent: list[float] = []
    for step in range(num_steps):
        batch = make_batch([training[index] for index in order.indices(step)], base.device)
        loss = next_token_loss(base.logits(None, batch), batch) / len(batch.targets)
        loss.backward()  # type: ignore[no-untyped-call] # torch has no types for it
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(float(loss.detach()))
        if (step + 1) % LOG_STEPS == 0:
            log.info("full fine-tuning  step %d  loss %.4f", step + 1, sum(recent) / len(recent))
            recent = []
    module.requires_grad_(False)
