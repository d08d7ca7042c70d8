"""A sequence's tokens and its transitions."""

from __future__ import annotations

import itertools
import random

import pytest

from server.engine.sequence import Sequence, SequenceStatus
from server.types import GenerationRequest, SamplingParams


def make(prompt: int, output: int) -> Sequence:
    request = GenerationRequest("r", tuple(range(prompt)), SamplingParams())
    seq = Sequence(request, index=0, seed=0, arrival=0.0)
    seq.output_token_ids = list(range(100, 100 + output))
    return seq


@pytest.mark.parametrize("prompt", [1, 2, 5])
@pytest.mark.parametrize("output", [0, 1, 4])
def test_token_ids_is_a_slice_of_prompt_and_output(prompt: int, output: int) -> None:
    seq = make(prompt, output)
    whole = (*range(prompt), *range(100, 100 + output))

    assert seq.num_tokens == len(whole)
    for start, stop in itertools.combinations(range(len(whole) + 1), 2):
        assert seq.token_ids(start, stop) == whole[start:stop]


def test_chunks_of_any_size_join_to_the_whole() -> None:
    rng = random.Random(0)
    for _ in range(200):
        seq = make(rng.randint(1, 30), rng.randint(0, 30))
        cuts = sorted({0, seq.num_tokens, *rng.choices(range(seq.num_tokens), k=4)})
        chunks = [seq.token_ids(a, b) for a, b in itertools.pairwise(cuts)]

        assert tuple(itertools.chain(*chunks)) == seq.token_ids(0, seq.num_tokens)


LEGAL = {
    ("waiting", "waiting_for_prefix"),
    ("waiting", "running"),
    ("waiting_for_prefix", "running"),
    ("running", "preempted"),
    ("preempted", "waiting_for_prefix"),
    ("preempted", "running"),
    *((state, "finished") for state in ("waiting", "waiting_for_prefix", "running", "preempted")),
}


@pytest.mark.parametrize("before", SequenceStatus)
@pytest.mark.parametrize("after", SequenceStatus)
def test_only_legal_transitions_are_made(before: SequenceStatus, after: SequenceStatus) -> None:
    seq = make(1, 0)
    seq.status = before

    if (before, after) in LEGAL:
        seq.become(after)
        assert seq.status is after
    else:
        with pytest.raises(AssertionError, match="->"):
            seq.become(after)
