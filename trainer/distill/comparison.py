"""The prefix beside what it stands for: the document in the prompt, the part of it that the teacher saw, and nothing.

On held-out conversations, with the base as training runs it for the divergence and the server's engine in process for answers
and times. Main thread; called by `distillation` at the end of a run. What it found is `comparison_report`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from prefix_store.artifact import decode
from prefix_store.spec import digest_of
from server.types import SamplingParams
from trainer.base import FrozenBase
from trainer.batches import make_batch
from trainer.distill.comparison_report import (
    CHUNK,
    DOCUMENT,
    NO_DOCUMENT,
    PREFIX,
    Comparison,
    Condition,
)
from trainer.distill.objective import DistillationLoss
from trainer.distill.studied_example import StudiedExample
from trainer.encoding import EncodedExample
from trainer.engine_in_process import EngineInProcess, Progress, Prompt
from trainer.metrics import METRICS
from trainer.prefix_cache import KeyValues
from trainer.standard_error import Score, score

_NUM_TIMED: Final = 8
_NUM_REPEATS: Final = 3


@dataclass(frozen=True, slots=True)
class Setup:
    """What is compared. `documents`: prompts of `examples` with the whole document, None where it does not fit.

    `chunks`: with the teacher's own part, which gives the reference answers.
    """

    base: FrozenBase
    engine: EngineInProcess
    objective: DistillationLoss
    artifact: bytes
    examples: Sequence[StudiedExample]
    documents: Sequence[tuple[int, ...]] | None
    chunks: Sequence[tuple[int, ...]]
    answering: SamplingParams
    rows: int


@dataclass(frozen=True, slots=True)
class _Side:
    """One condition: each example's prompt, what stands before it, and the tokens whose K/V that costs.

    `alone`: one row at a time, because many together might not fit into memory.
    """

    prompts: Sequence[tuple[int, ...]]
    artifact: bytes | None
    num_tokens: float
    shared: bool
    alone: bool = False

    def asked(self) -> list[Prompt]:
        return [Prompt(prompt, self.artifact) for prompt in self.prompts]


def compare(setup: Setup, on_progress: Progress) -> Comparison:
    """Answers are greedy, by the artifact's own rules for their end. Raises `PrefixRejected`."""
    sides = _sides(setup)
    answers = _answers(setup, sides, on_progress)
    references = answers[CHUNK if CHUNK in sides else DOCUMENT]
    seconds = _first_token_seconds(setup, sides)
    conditions = {}
    for name, side in sides.items():
        loss, agreement = _divergence(setup, side)
        conditions[name] = Condition(
            divergence=loss,
            same_token=agreement,
            same_answer=_score("exact_match", answers[name], references),
            token_f1=_score("token_f1", answers[name], references),
            first_token_seconds=seconds[name],
            num_kv_tokens=round(side.num_tokens),
            kv_bytes=round(side.num_tokens * setup.base.model.layout.bytes_per_token),
            kv_shared=side.shared,
        )
    return Comparison(len(setup.examples), setup.documents is not None, conditions)


def _sides(setup: Setup) -> dict[str, _Side]:
    served = [example.prompt_token_ids for example in setup.examples]
    count = _prefix(setup).num_virtual_tokens
    sides = {PREFIX: _Side(served, setup.artifact, count, shared=True)}
    if setup.documents is not None:
        excess = _mean_excess(setup.documents, served)
        alone = max(map(len, setup.documents)) > 2 * max(map(len, setup.chunks))
        sides[DOCUMENT] = _Side(setup.documents, None, excess, shared=False, alone=alone)
    if setup.documents is None or list(setup.documents) != list(setup.chunks):
        sides[CHUNK] = _Side(setup.chunks, None, _mean_excess(setup.chunks, served), shared=False)
    sides[NO_DOCUMENT] = _Side(served, None, 0, shared=False)
    return sides


def _mean_excess(prompts: Sequence[tuple[int, ...]], served: Sequence[tuple[int, ...]]) -> float:
    """Tokens that stand before what is served."""
    return statistics.fmean(len(p) - len(s) for p, s in zip(prompts, served, strict=True))


def _prefix(setup: Setup) -> KeyValues:
    found = decode(setup.artifact, digest_of(setup.artifact))
    device = setup.base.device
    return KeyValues.of([tensor.to(device) for tensor in (*found.keys, *found.values)])


@torch.no_grad()
def _divergence(setup: Setup, side: _Side) -> tuple[float, float]:
    """Nats an answer's token from the teacher, and at how many percent of them the most probable token is the same."""
    prefix = None if side.artifact is None else _prefix(setup)
    examples: list[EncodedExample] = [
        replace(example, prompt_token_ids=prompt)
        for example, prompt in zip(setup.examples, side.prompts, strict=True)
    ]
    examples.sort(key=lambda example: example.num_tokens)
    total, num_same, count, rows = 0.0, 0, 0, 1 if side.alone else setup.rows
    for start in range(0, len(examples), rows):
        batch = make_batch(examples[start : start + rows], setup.base.device)
        logits = setup.base.logits(prefix, batch)
        total += float(setup.objective(logits, batch))
        num_same += setup.objective.num_agreements(logits, batch)
        count += len(batch.targets)
    # Of a distribution from itself rounding may leave a little less than nothing.
    return max(total / count, 0.0), 100 * num_same / count


def _answers(
    setup: Setup, sides: Mapping[str, _Side], on_progress: Progress
) -> dict[str, list[str]]:
    """Batched as a server would run them."""
    done, total = 0, len(sides) * len(setup.examples)
    found = {}
    for name, side in sides.items():
        came = setup.engine.generate(side.asked(), setup.answering, one_by_one=side.alone)
        found[name] = [completion.text for completion in came]
        done += len(came)
        on_progress(done, total)
    return found


def _first_token_seconds(setup: Setup, sides: Mapping[str, _Side]) -> dict[str, float]:
    """Median, one request at a time, the conditions in turn, so that what else the machine does meets all of them.

    The prefix is resident, as it is for all requests of a task but the first: a first round is not counted.
    """
    some = {name: side.asked()[:_NUM_TIMED] for name, side in sides.items()}
    num_prompts = len(next(iter(some.values())))
    order = [
        (name, asked[index])
        for _ in range(1 + _NUM_REPEATS)
        for index in range(num_prompts)
        for name, asked in some.items()
    ]
    one_token = SamplingParams(max_tokens=1, temperature=0.0)
    came = setup.engine.generate([prompt for _, prompt in order], one_token, one_by_one=True)
    warm = num_prompts * len(some)
    found: dict[str, list[float]] = {name: [] for name in some}
    for (name, _), completion in list(zip(order, came, strict=True))[warm:]:
        found[name].append(completion.first_token_seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _score(metric: str, answers: Sequence[str], references: Sequence[str]) -> Score:
    known = METRICS[metric]
    return score(known.rows(answers, references), known.value, yes_or_no=known.yes_or_no)
