"""Examples as tensors, and the order in which they come: a pure function of seed and step.

Called by `loop` and `held_out_loss`. Because the order depends on nothing that happened before, a resumed run goes on
with the very batch that an uninterrupted one would have had.

B = rows, T = tokens of the longest row, N = completion tokens of all rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trainer.encoding import EncodedExample

_BUCKET_BATCHES: Final = 8
"""Batches whose examples are sorted by length together: less padding, and still a random order."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Padded on the right, so that causality hides the padding and positions need no mask.

    Target n is predicted by the token at `columns[n]` of row `rows[n]`. The last token of a completion is only
    predicted, never fed. `num_tokens` counts what is fed, without padding.
    """

    examples: tuple[EncodedExample, ...]
    token_ids: Tensor  # [B, T]
    rows: Tensor  # [N]
    columns: Tensor  # [N]
    targets: Tensor  # [N]
    num_tokens: int


def make_batch(examples: Sequence[EncodedExample], device: torch.device) -> Batch:
    """The examples as one batch on `device`."""
    fed = [(*e.prompt_token_ids, *e.completion_token_ids[:-1]) for e in examples]
    token_ids = torch.zeros(len(fed), max(map(len, fed)), dtype=torch.int64)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (example, tokens) in enumerate(zip(examples, fed, strict=True)):
        token_ids[row, : len(tokens)] = torch.tensor(tokens)
        rows += [row] * len(example.completion_token_ids)
        columns += range(len(example.prompt_token_ids) - 1, len(tokens))
        targets += example.completion_token_ids
    return Batch(
        tuple(examples),
        token_ids.to(device),
        torch.tensor(rows).to(device),
        torch.tensor(columns).to(device),
        torch.tensor(targets).to(device),
        sum(map(len, fed)),
    )


class DataOrder:
    """Which examples each step trains on. Every example once an epoch, in batches of similar length."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """`lengths[i]`: tokens of example i."""
        assert lengths, "no examples, no order"
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def steps_per_epoch(self) -> int:
        """Batches until every example was seen; the last may be smaller."""
        return math.ceil(len(self._lengths) / self._batch_size)

    def indices(self, step: int) -> list[int]:
        """The examples of step `step`, which counts from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self._seed}/{epoch}")  # noqa: S311 - an order, no secret
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        size, bucket = self._batch_size, self._batch_size * _BUCKET_BATCHES
        for start in range(0, len(order), bucket):
            order[start : start + bucket] = sorted(
                order[start : start + bucket], key=lambda index: self._lengths[index]
            )
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        rng.shuffle(batches)
        return batches
