"""From logits to the next token of each row.

Runs on the engine thread. Everything a row needs is rebuilt from its request and its tokens at each step;
nothing is kept per batch slot, so no row can inherit another's state.

Randomness is keyed by (seed, number of tokens generated so far): a row draws the same number whatever its
batch mates are, and draws it again after a preemption.

R = rows, V = vocabulary (the width of the logits).
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from typing import Final

import torch
from torch import Tensor

from server.engine.messages import RowOutcome
from server.engine.sequence import Sequence
from server.types import SamplingParams

NUMERICAL_ERROR: Final = "the model produced non-finite logits for this request"
_MASK64: Final = 2**64 - 1
_MIN_TEMPERATURE: Final = 1e-30  # less is 0 as float32, and 0 / 0 is NaN for the whole row


def most_probable(logits: Tensor) -> Tensor:
    """The first of the tokens with the highest logit of each row, int64 [R]; -1 where a row is not finite.

    One pass over R x V values, as they are: this is most of what a step costs outside of the model.
    """
    highest, first_highest = logits.max(dim=-1)
    # The maximum is NaN or inf if any entry is, and -inf if no token is possible.
    return first_highest.where(highest.isfinite(), -1)


def sample(
    logits: Tensor,
    sequences: Sequence_[Sequence],
    eos_token_ids: frozenset[int],
    best: Tensor | None = None,
) -> list[RowOutcome]:
    """One outcome per row of `logits` [R, V]. A non-finite row fails alone. `best`: `most_probable`, if it is known."""
    tokens: list[int] = (most_probable(logits) if best is None else best).tolist()
    outcomes = []
    for row, (seq, token) in enumerate(zip(sequences, tokens, strict=True)):
        if token < 0:
            outcomes.append(RowOutcome(error=NUMERICAL_ERROR))
        elif _argmax_suffices(seq):
            outcomes.append(RowOutcome(token_id=token))
        else:
            drawn = _sample_row(logits[row].float(), seq, eos_token_ids)
            outcomes.append(RowOutcome(token_id=drawn))
    return outcomes


def _argmax_suffices(seq: Sequence) -> bool:
    params = seq.request.sampling
    return params.greedy and not _has_penalties(params) and not _blocks_stops(seq)


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _blocks_stops(seq: Sequence) -> bool:
    return len(seq.output_token_ids) < seq.request.sampling.min_tokens


def _sample_row(logits: Tensor, seq: Sequence, eos_token_ids: frozenset[int]) -> int:
    """The next token of one row, logits [V]."""
    params = seq.request.sampling
    logits = logits.clone()
    if _has_penalties(params):
        _apply_penalties(logits, seq)
    if _blocks_stops(seq):
        _block_stops(logits, params, eos_token_ids)
    if params.greedy:
        return int(logits.argmax())
    # Dividing by a tiny temperature may overflow; relative to the maximum it can only underflow.
    logits = (logits - logits.max()) / max(params.temperature, _MIN_TEMPERATURE)
    logits = _keep_top_k(logits, params.top_k)
    probabilities = logits.softmax(-1)
    probabilities = _keep_top_p(probabilities, params.top_p)
    probabilities = _keep_min_p(probabilities, params.min_p)
    return _draw(probabilities, seq.seed, len(seq.output_token_ids))


def _apply_penalties(logits: Tensor, seq: Sequence) -> None:
    """Repetition over prompt and output (Keskar et al. 2019); presence and frequency over output (OpenAI)."""
    params = seq.request.sampling
    width = logits.shape[-1]
    seen = torch.tensor(sorted({*seq.request.prompt_token_ids, *seq.output_token_ids}))
    seen = seen[seen < width].to(logits.device)
    chosen = logits[seen]
    penalty = params.repetition_penalty
    logits[seen] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    if seq.output_token_ids:
        counts = torch.bincount(torch.tensor(seq.output_token_ids), minlength=width)[:width]
        counts = counts.to(logits.device)
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _block_stops(logits: Tensor, params: SamplingParams, eos_token_ids: frozenset[int]) -> None:
    """Rules out every token that would end the sequence before `min_tokens`."""
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else eos_token_ids)
    ids = [i for i in stops if i < logits.shape[-1]]
    if len(ids) < logits.shape[-1]:
        logits[ids] = float("-inf")


def _keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(top_k).values[-1]
    return logits.masked_fill(logits < threshold, float("-inf"))


def _keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens whose probabilities sum to at least `top_p` (Holtzman et al. 2020)."""
    if top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probabilities)
    kept[order] = ordered.masked_fill(before >= top_p, 0.0)
    return kept


def _keep_min_p(probabilities: Tensor, min_p: float) -> Tensor:
    """Tokens at least `min_p` times as probable as the most probable one (Nguyen et al. 2024)."""
    if min_p <= 0.0:
        return probabilities
    return probabilities.masked_fill(probabilities < min_p * probabilities.max(), 0.0)


def _draw(probabilities: Tensor, seed: int, position: int) -> int:
    """A token in proportion to `probabilities` [V], which need not sum to one.

    Exponential race: argmax of p / Exp(1) is distributed as p, needs no normalisation, and can not raise.
    """
    generator = torch.Generator(device="cpu")
    generator.manual_seed(_mix(seed, position))
    noise = torch.empty(probabilities.shape).exponential_(generator=generator).clamp_min_(1e-30)
    return int((probabilities.cpu() / noise).argmax())


def _mix(seed: int, position: int) -> int:
    """Two numbers to one 64-bit seed (splitmix64 finaliser), so that neighbours are unrelated."""
    z = (seed * 0x9E3779B97F4A7C15 + position + 1) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
