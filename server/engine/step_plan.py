"""A step's plan while the scheduler makes it: rows that can be taken back, and the budget that they use.

Owned by the engine thread; made and filled by the scheduler for each step, which decides what goes in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from server.engine.messages import (
    MAX_TOLD_TOKENS,
    Answer,
    PrefixLoad,
    ScheduledRow,
    SchedulerOutput,
)
from server.engine.sequence import Sequence
from server.types import PrefixRef


@dataclass(slots=True)
class StepPlan:
    """`budget`: own tokens that the step can still take; `told_budget`: of prompts whose log-probabilities are asked for. Rows are keyed by sequence: a preemption takes one back."""

    budget: int
    told_budget: int = MAX_TOLD_TOKENS
    rows: dict[Sequence, ScheduledRow] = field(default_factory=dict)
    prefix_requests: list[PrefixRef] = field(default_factory=list)
    prefix_loads: list[PrefixLoad] = field(default_factory=list)
    num_preemptions: int = 0
    answers: list[Answer] = field(default_factory=list)
    wipe_block_ids: tuple[int, ...] = ()

    def add_row(self, seq: Sequence) -> None:
        """As many of the sequence's tokens as the budgets allow; it has blocks for all of them. None may be allowed."""
        start = seq.num_computed_tokens
        told_from = max(start, seq.num_told_tokens)
        # The token behind the last of these is the prompt's last, or they would be of an answer.
        end = max(told_from, len(seq.request.prompt_token_ids) - 1)
        stop = min(seq.num_tokens, start + self.budget)
        if stop > told_from and end > told_from:
            stop = min(stop, told_from + self.told_budget)
        if stop == start:
            return
        num_tokens, told_to = stop - start, max(told_from, min(stop, end))
        self.told_budget -= told_to - told_from
        prefix = seq.request.prefix
        self.rows[seq] = ScheduledRow(
            sequence=seq,
            token_ids=seq.token_ids(start, stop),
            start=start,
            prefix_block_ids=seq.lease.resident.block_ids if seq.lease else (),
            num_virtual_tokens=seq.num_virtual_tokens,
            first_position=prefix.first_position if prefix else 0,
            block_ids=tuple(seq.block_table),
            sample=stop == seq.num_tokens,
            told_from=told_from,
            told_token_ids=seq.request.prompt_token_ids[told_from + 1 : told_to + 1],
        )
        self.budget -= num_tokens

    def take_back(self, seq: Sequence) -> None:
        """The sequence does not run in this step after all."""
        row = self.rows.pop(seq, None)
        if row is not None:
            self.budget += len(row.token_ids)
            self.told_budget += len(row.told_token_ids)

    def finished_plan(self) -> SchedulerOutput:
        """What the runner is given."""
        return SchedulerOutput(
            prefix_requests=tuple(self.prefix_requests),
            prefix_loads=tuple(self.prefix_loads),
            rows=tuple(self.rows.values()),
            num_preemptions=self.num_preemptions,
            answers=tuple(self.answers),
            wipe_block_ids=self.wipe_block_ids,
        )


def computes(rows: Iterable[ScheduledRow], key: bytes) -> bool:
    """Whether a row is on its way to the block of tokens with this key, to enter it into the prompt cache."""
    chains = (row.sequence.chain for row in rows if len(row.token_ids) > 1)
    return any(key in chain.keys[len(chain.blocks) + 1 :] for chain in chains)
