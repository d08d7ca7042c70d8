"""Log-probabilities of tokens, computed where the logits are, for those rows of a step that ask for them.

Called by `ModelRunner.launch` on the engine thread; nothing here waits for the device but `of_rows`. What is told is what the
model found: before bias, penalties and temperature.

N = tokens that are told of in a step, V = vocabulary, K = the most alternatives that any of them asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from server.engine.messages import ScheduledRow
from server.kvcache.to_device import to_device
from server.types import TokenLogprob

LEAST: Final = -9999.0
"""JSON has no infinities; as in vLLM's answers."""

# Logits that are turned into float32 and normalised together: as in the sampler.
_ROWS_ON_CPU: Final = 4
_ROWS_ON_GPU: Final = 32


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """What one row is told: of the token that it sampled, and of tokens of its prompt. `finite` False: the model gave no
    number for one of them, and the row has failed.
    """

    sampled: TokenLogprob | None = None
    prompt: tuple[TokenLogprob, ...] = ()
    finite: bool = True


@dataclass(frozen=True, slots=True)
class _Wish:
    """`place`: of the logits that the token follows. `token_id` None: the one that is sampled from them."""

    row: int
    place: int
    num_top: int
    token_id: int | None


@dataclass(frozen=True)
class StepLogprobs:
    """Of one step, on their way to the host: complete when the step has ended."""

    num_rows: int
    wishes: tuple[_Wish, ...]
    tokens: Tensor  # [N]
    values: Tensor  # [N, 1 + K] the token's own, and those of the most probable ones
    top_ids: Tensor  # [N, K]

    def of_rows(self) -> list[RowLogprobs]:
        """One per row of the plan."""
        sampled: dict[int, TokenLogprob] = {}
        prompts: dict[int, list[TokenLogprob]] = {}
        failed: set[int] = set()
        told = zip(
            self.wishes,
            self.tokens.tolist(),
            self.values.tolist(),
            self.top_ids.tolist(),
            strict=True,
        )
        for wish, token_id, (own, *best), ids in told:
            if math.isnan(own):
                failed.add(wish.row)
                continue
            top = tuple(zip(ids[: wish.num_top], best[: wish.num_top], strict=True))
            entry = TokenLogprob(token_id, own, top)
            if wish.token_id is None:
                sampled[wish.row] = entry
            else:
                prompts.setdefault(wish.row, []).append(entry)
        return [
            RowLogprobs(finite=False)
            if row in failed
            else RowLogprobs(sampled.get(row), tuple(prompts.get(row, ())))
            for row in range(self.num_rows)
        ]


def step_logprobs(
    rows: Sequence_[ScheduledRow], logits: Tensor, sampled: Tensor
) -> StepLogprobs | None:
    """Of `logits` [sampling rows, then told tokens, V] and the tokens [sampling rows] sampled from the first of them.

    None if no row asks for any.
    """
    wishes = _wishes(rows)
    if not wishes:
        return None
    device = logits.device
    places = to_device(torch.tensor([wish.place for wish in wishes]), device)
    tokens = _tokens(wishes, sampled, places)
    num_top = min(max(wish.num_top for wish in wishes), logits.shape[-1])
    together = _ROWS_ON_CPU if device.type == "cpu" else _ROWS_ON_GPU
    parts = [
        _values(logits.index_select(0, places[start:end]), tokens[start:end], num_top)
        for start, end in _spans(len(wishes), together)
    ]
    values, top_ids = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return StepLogprobs(len(rows), wishes, _to_host(tokens), _to_host(values), _to_host(top_ids))


def _wishes(rows: Sequence_[ScheduledRow]) -> tuple[_Wish, ...]:
    wishes = []
    sampling = [number for number, row in enumerate(rows) if row.sample]
    for place, number in enumerate(sampling):
        num_top = rows[number].sequence.request.sampling.logprobs
        if num_top is not None:
            wishes.append(_Wish(number, place, num_top, None))
    place = len(sampling)
    for number, row in enumerate(rows):
        num_top = row.sequence.request.sampling.prompt_logprobs or 0
        for token_id in row.told_token_ids:
            wishes.append(_Wish(number, place, num_top, token_id))
            place += 1
    return tuple(wishes)


def _tokens(wishes: Sequence_[_Wish], sampled: Tensor, places: Tensor) -> Tensor:
    """The token of each wish [N]. That of a row which failed is any: nobody will be told."""
    known = [-1 if wish.token_id is None else wish.token_id for wish in wishes]
    given = to_device(torch.tensor(known), places.device)
    if not len(sampled):
        return given
    drawn = sampled.index_select(0, places.clamp_max(len(sampled) - 1)).clamp_min(0)
    return drawn.where(given < 0, given)


def _spans(count: int, length: int) -> list[tuple[int, int]]:
    """0..count-1 in pieces of up to `length`."""
    return [(start, min(start + length, count)) for start in range(0, count, length)]


def _values(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """Of `logits` [n, V] after which `tokens` [n] come: [n, 1 + K] values and the ids [n, K] of the best.

    Finite, or NaN all along a row of logits that has one: its sum knows no number.
    """
    logprobs = logits.float().log_softmax(-1)
    best, ids = logprobs.topk(num_top)
    # From one tensor, so that the most probable token's own value is the first of the best, to the bit.
    values = torch.cat([logprobs.gather(1, tokens[:, None]), best], dim=1)
    return values.clamp_min(LEAST), ids  # NaN stays NaN


def _to_host(tensor: Tensor) -> Tensor:
    """Copied without waiting for it, from a GPU into pinned memory."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
