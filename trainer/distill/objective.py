"""What is minimised: how far the base behind the prefix is from the base behind the document. Called by the loop.

The divergence KL(teacher | student) of the k tokens that the teacher finds most probable and of all others together: 0 exactly
where both agree on these, in nats. Its gradient is that of the cross entropy with the teacher's probabilities, rest
included; the entropy of the teacher, which no prefix can change, is taken off, so the figure says how far there is to go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.batches import Batch
from trainer.distill.studied_example import StudiedExample
from trainer.distill.teacher import TopK
from trainer.encoding import EncodedExample
from trainer.loss import widened


@dataclass(frozen=True, slots=True, eq=False)
class DistillationLoss:
    """An `Objective`. `teacher`: by the number of the conversation; every example must have one."""

    teacher: Mapping[int, TopK]

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Nats, summed over the answers' tokens; `logits` [N, V] are the student's."""
        token_ids, log_probs = self.targets(batch.examples, logits.device)
        return divergence(widened(logits), token_ids, log_probs).sum()

    def num_agreements(self, logits: Tensor, batch: Batch) -> int:
        """At how many places student and teacher find the same token most probable."""
        token_ids, _ = self.targets(batch.examples, logits.device)
        return int((logits.argmax(-1) == token_ids[:, 0]).sum())

    def targets(
        self, examples: Sequence[EncodedExample], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The teacher's tokens and log-probabilities [N, k], in the order of a batch's targets."""
        found = []
        for example in examples:
            assert isinstance(example, StudiedExample), "distillation needs studied examples"
            found.append(self.teacher[example.conversation])
        token_ids = torch.cat([top.token_ids for top in found]).to(device)
        return token_ids, torch.cat([top.log_probs for top in found]).to(device)


def divergence(logits: Tensor, token_ids: Tensor, log_probs: Tensor) -> Tensor:
    """[N]: KL of k tokens and the rest, of the teacher's `log_probs` [N, k] from the student's `logits` [N, V]."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    student = logits.gather(-1, token_ids) - normaliser  # [N, k]
    others = logits.scatter(-1, token_ids, float("-inf")).logsumexp(-1) - normaliser[:, 0]  # [N]
    log_probs = log_probs.to(logits.dtype)
    top = (log_probs.exp() * (log_probs - student)).sum(-1)
    rest = (1 - log_probs.exp().sum(-1)).clamp_min(0)  # rounding may leave a little less than none
    return top + torch.xlogy(rest, rest) - rest * others
