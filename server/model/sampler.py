"""From logits to the next token of each row, on the device that has the logits.

Runs on the engine thread, which does not wait for the device before it asks for the outcomes. Everything a row needs is rebuilt from its request and its tokens at each step;
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
from server.kvcache.to_device import to_device
from server.types import SamplingParams

NUMERICAL_ERROR: Final = "the model produced non-finite logits for this request"
_MASK64: Final = 2**64 - 1
# Rows that are not greedy, computed together. Few stay in a CPU's cache: 32 of 152,000 tokens took twice the time there.
# On a GPU 32 of them take about 200 MB meanwhile.
_ROWS_ON_CPU: Final = 4
_ROWS_ON_GPU: Final = 32
_FEW: Final = 1024
_MIN_TEMPERATURE: Final = 1e-30  # less is 0 as float32, and 0 / 0 is NaN for the whole row


def most_probable(logits: Tensor) -> Tensor:
    """The first of the tokens with the highest logit of each row, int64 [R]; -1 where a row is not finite.

    One pass over R x V values, as they are: this is most of what a step costs outside of the model.
    """
    highest, first_highest = logits.max(dim=-1)
    # The maximum is NaN or inf if any entry is, and -inf if no token is possible.
    return first_highest.where(highest.isfinite(), -1)


def outcomes_of(tokens: Tensor) -> list[RowOutcome]:
    """What `next_tokens` [R] say of each row. A non-finite one fails alone."""
    return [
        RowOutcome(error=NUMERICAL_ERROR) if token < 0 else RowOutcome(token_id=token)
        for token in tokens.tolist()
    ]


def next_tokens(
    logits: Tensor,
    sequences: Sequence_[Sequence],
    eos_token_ids: frozenset[int],
    best: Tensor | None = None,
) -> Tensor:
    """The next token of each row of `logits` [R, V], int64 [R]; -1 where a row is not finite.

    `best`: `most_probable` of them, if it is known.
    """
    best = most_probable(logits) if best is None else best
    others = [row for row, seq in enumerate(sequences) if not _argmax_suffices(seq)]
    if not others:
        return best
    tokens = best.clone()
    together = _ROWS_ON_CPU if logits.device.type == "cpu" else _ROWS_ON_GPU
    for start in range(0, len(others), together):
        some = others[start : start + together]
        rows = to_device(torch.tensor(some), logits.device)
        chosen = _choose(logits[rows].float(), [sequences[row] for row in some], eos_token_ids)
        tokens[rows] = chosen.where(best[rows] >= 0, -1)
    return tokens


def _argmax_suffices(seq: Sequence) -> bool:
    params = seq.request.sampling
    changed = params.has_penalties or params.logit_bias or _blocks_stops(seq)
    return params.greedy and not changed


def _blocks_stops(seq: Sequence) -> bool:
    return len(seq.output_token_ids) < seq.request.sampling.min_tokens


def _choose(
    logits: Tensor, sequences: Sequence_[Sequence], eos_token_ids: frozenset[int]
) -> Tensor:
    """The next token [R] of rows of which each asks for more than the most probable one; changes `logits` [R, V]."""
    for row, seq in zip(logits, sequences, strict=True):
        if seq.request.sampling.logit_bias:
            _apply_bias(row, seq.request.sampling)
        if seq.request.sampling.has_penalties:
            _apply_penalties(row, seq)
        if _blocks_stops(seq):
            _block_stops(row, seq.request.sampling, eos_token_ids)
    greedy = [seq.request.sampling.greedy for seq in sequences]
    if all(greedy):
        return logits.argmax(-1)
    drawn = _draw(_probabilities(logits, sequences), sequences)
    if not any(greedy):
        return drawn
    return logits.argmax(-1).where(_column(greedy, logits)[:, 0], drawn)


def _probabilities(logits: Tensor, sequences: Sequence_[Sequence]) -> Tensor:
    """In proportion to which a token is drawn [R, V]; rows need not sum to one. Greedy rows: anything finite."""
    params = [seq.request.sampling for seq in sequences]
    temperatures = [1.0 if p.greedy else max(p.temperature, _MIN_TEMPERATURE) for p in params]
    # Dividing by a tiny temperature may overflow; relative to the maximum it can only underflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / _column(temperatures, logits)
    logits = _keep_top_k(logits, [p.top_k for p in params])
    probabilities = _keep_top_p(logits.softmax(-1), [p.top_p for p in params])
    return _keep_min_p(probabilities, [p.min_p for p in params])


def _column(values: Sequence_[float], like: Tensor) -> Tensor:
    """One value per row [R, 1], on the device of the logits; booleans stay so."""
    return to_device(torch.tensor(values), like.device)[:, None]


def _apply_bias(logits: Tensor, params: SamplingParams) -> None:
    """Adds to the logits of some tokens (OpenAI); each is named once."""
    bias = [(i, value) for i, value in params.logit_bias if i < logits.shape[-1]]
    ids = to_device(torch.tensor([i for i, _ in bias], dtype=torch.int64), logits.device)
    values = to_device(torch.tensor([v for _, v in bias], dtype=logits.dtype), logits.device)
    logits.index_add_(0, ids, values)


def _apply_penalties(logits: Tensor, seq: Sequence) -> None:
    """Repetition over prompt and output (Keskar et al. 2019); presence and frequency over output (OpenAI)."""
    params = seq.request.sampling
    width = logits.shape[-1]
    seen = torch.tensor(sorted({*seq.request.prompt_token_ids, *seq.output_token_ids}))
    seen = to_device(seen[seen < width], logits.device)
    chosen = logits[seen]
    penalty = params.repetition_penalty
    logits[seen] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    if seq.output_token_ids:
        counts = torch.bincount(torch.tensor(seq.output_token_ids), minlength=width)[:width]
        counts = to_device(counts, logits.device)
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _block_stops(logits: Tensor, params: SamplingParams, eos_token_ids: frozenset[int]) -> None:
    """Rules out every token that would end the sequence before `min_tokens`."""
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else eos_token_ids)
    ids = [i for i in stops if i < logits.shape[-1]]
    if len(ids) < logits.shape[-1]:
        logits.index_fill_(
            -1, to_device(torch.tensor(ids, dtype=torch.int64), logits.device), float("-inf")
        )


def _keep_top_k(logits: Tensor, top_k: Sequence_[int]) -> Tensor:
    """[R, V] with -inf for what is not among a row's `top_k`; 0 or less keeps all."""
    V = logits.shape[-1]
    limits = [k if 0 < k < V else 0 for k in top_k]
    if not any(limits):
        return logits
    highest = logits.topk(max(limits)).values  # [R, the largest k]
    last = _column([max(k - 1, 0) for k in limits], logits)
    threshold = highest.gather(1, last)
    return logits.masked_fill((logits < threshold) & (_column(limits, logits) > 0), float("-inf"))


def _keep_top_p(probabilities: Tensor, top_p: Sequence_[float]) -> Tensor:
    """The smallest set of tokens whose probabilities sum to at least `top_p` (Holtzman et al. 2020).

    Tokens as probable as the least probable of them are kept too.
    """
    limits = [p for p in top_p if p < 1.0]
    if not limits:
        return probabilities
    rows = [row for row, p in enumerate(top_p) if p < 1.0]
    limited = to_device(torch.tensor(rows), probabilities.device)
    least = torch.zeros_like(probabilities[:, :1])
    least[limited] = _least_of_nucleus(probabilities[limited], _column(limits, probabilities))
    return probabilities.masked_fill(probabilities < least, 0.0)


def _least_of_nucleus(probabilities: Tensor, limits: Tensor) -> Tensor:
    """The probability [R, 1] at which the sum over the more probable ones reaches `limits` [R, 1]."""
    V = probabilities.shape[-1]
    # Sorting all takes a CPU twenty times longer than finding the few that a nucleus mostly has.
    for count in (min(_FEW, V), V) if probabilities.device.type == "cpu" else (V,):
        ordered = probabilities.topk(count).values
        total = ordered.cumsum(-1)
        if count == V or bool((total[:, -1:] >= limits).all()):
            break
    num_kept = (total - ordered < limits).sum(-1, keepdim=True)
    return ordered.gather(1, (num_kept - 1).clamp_min(0))


def _keep_min_p(probabilities: Tensor, min_p: Sequence_[float]) -> Tensor:
    """Tokens at least `min_p` times as probable as the most probable one (Nguyen et al. 2024)."""
    if not any(p > 0.0 for p in min_p):
        return probabilities
    least = _column([max(p, 0.0) for p in min_p], probabilities) * probabilities.amax(-1, True)
    return probabilities.masked_fill(probabilities < least, 0.0)


def _draw(probabilities: Tensor, sequences: Sequence_[Sequence]) -> Tensor:
    """A token of each row [R] in proportion to `probabilities` [R, V]: where their sum first exceeds a random part of it."""
    total = probabilities.cumsum(-1, dtype=torch.float64)
    parts = [_uniform(seq.seed, len(seq.output_token_ids)) for seq in sequences]
    target = to_device(torch.tensor(parts, dtype=torch.float64), total.device)[:, None]
    target = torch.minimum(target * total[:, -1:], total[:, -1:].nextafter(target.new_zeros(())))
    # The first sum above the target is of a token that adds to it, never of one that was ruled out.
    return torch.searchsorted(total, target, right=True)[:, 0].clamp_max(total.shape[-1] - 1)


def _uniform(seed: int, position: int) -> float:
    """A number of 53 random bits in [0, 1)."""
    return (_mix(seed, position) >> 11) * 2.0**-53


def _mix(seed: int, position: int) -> int:
    """Two numbers to one 64-bit seed (splitmix64 finaliser), so that neighbours are unrelated."""
    z = (seed * 0x9E3779B97F4A7C15 + position + 1) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
