"""Loss on examples that are not trained on, teacher-forced, in nats a completion token. Called by `loop`, and
by the sweep, which needs each example's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch.nn.functional import cross_entropy

from trainer.base import FrozenBase
from trainer.batches import make_batch
from trainer.encoding import EncodedExample
from trainer.loss import Objective, widened
from trainer.metrics import Rows
from trainer.prefix_cache import KeyValues

_GROUPS: Final = 8  # of examples, whose differences tell how sure their mean is


@torch.no_grad()
def mean_loss(
    base: FrozenBase,
    prefix: KeyValues | None,
    examples: Sequence[EncodedExample],
    rows: int,
    objective: Objective,
) -> float:
    """Mean over all completion tokens of the examples, `rows` of them in a pass."""
    by_length = sorted(examples, key=lambda example: example.num_tokens)
    total, count = 0.0, 0
    for start in range(0, len(by_length), rows):
        batch = make_batch(by_length[start : start + rows], base.device)
        total += float(objective(base.logits(prefix, batch), batch))
        count += len(batch.targets)
    return total / count


@torch.no_grad()
def nats_by_example(
    base: FrozenBase, prefix: KeyValues, examples: Sequence[EncodedExample], rows: int
) -> Rows:
    """(nats, completion tokens) of each example, in their order; `metrics.loss` of the totals is the mean loss."""
    order = sorted(range(len(examples)), key=lambda index: examples[index].num_tokens)
    found: Rows = [()] * len(examples)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        batch = make_batch([examples[index] for index in chosen], base.device)
        logits = widened(base.logits(prefix, batch))  # [N, V]
        nats = cross_entropy(logits, batch.targets, reduction="none").double()
        sums = nats.new_zeros(len(chosen)).index_add_(0, batch.rows, nats).tolist()
        for index, total in zip(chosen, sums, strict=True):
            found[index] = (total, float(len(examples[index].completion_token_ids)))
    return found


def with_other_prompts(
    examples: Sequence[EncodedExample], room: int | None
) -> list[EncodedExample]:
    """The same completions, each behind the next example's prompt: what shows whether prompts matter at all.

    `room`: tokens that the model has positions for behind the prefix, None for no limit. Each example fits, but a long prompt
    before another's long completion may not; of such a prompt the end is taken.
    """
    others = [*examples[1:], examples[0]]
    return [
        replace(
            example,
            prompt_token_ids=other.prompt_token_ids
            if room is None
            else other.prompt_token_ids[len(example.completion_token_ids) - room :],
        )
        for example, other in zip(examples, others, strict=True)
    ]


def gap_error(
    loss_of: Callable[[Sequence[EncodedExample]], float],
    examples: Sequence[EncodedExample],
    others: Sequence[EncodedExample],
) -> float:
    """Standard error of the difference of two losses over the same completions, of two examples or more."""
    count = min(_GROUPS, len(examples))
    gaps = [loss_of(others[i::count]) - loss_of(examples[i::count]) for i in range(count)]
    return float(torch.tensor(gaps, dtype=torch.float64).std()) / math.sqrt(count)
