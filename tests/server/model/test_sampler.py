"""From logits to tokens: each parameter, and that no row touches another."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from server.engine.messages import RowOutcome
from server.engine.sequence import Sequence
from server.model.sampler import next_tokens, outcomes_of
from server.types import GenerationRequest, SamplingParams

V = 50
EOS = frozenset({3})
GREEDY = SamplingParams(max_tokens=9, temperature=0.0)


def sequence(
    sampling: SamplingParams,
    *,
    seed: int = 0,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
) -> Sequence:
    seq = Sequence(GenerationRequest("r", prompt, sampling), index=0, seed=seed, arrival=0.0)
    seq.output_token_ids = list(output)
    return seq


def sample(logits: Tensor, sequences: list[Sequence], eos: frozenset[int]) -> list[RowOutcome]:
    return outcomes_of(next_tokens(logits, sequences, eos))


def one(logits: Tensor, seq: Sequence) -> int:
    (outcome,) = sample(logits[None], [seq], EOS)
    assert outcome.token_id is not None
    return outcome.token_id


def draws(logits: Tensor, sampling: SamplingParams, count: int = 2000) -> Counter[int]:
    return Counter(one(logits, sequence(sampling, seed=seed)) for seed in range(count))


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def test_temperature_zero_takes_the_largest_logit() -> None:
    logits = random_logits(8)

    outcomes = sample(logits, [sequence(GREEDY)] * 8, EOS)

    assert [o.token_id for o in outcomes] == logits.argmax(-1).tolist()


def test_a_bias_adds_to_the_logits_of_its_tokens_and_to_no_other_row() -> None:
    logits = random_logits(2)
    best = logits[0].argmax().item()
    other = (int(best) + 1) % V
    pushed = SamplingParams(
        max_tokens=9, temperature=0.0, logit_bias=((other, 100.0), (V + 7, 100.0))
    )
    banned = SamplingParams(max_tokens=9, temperature=0.0, logit_bias=((int(best), -100.0),))

    assert one(logits[0], sequence(pushed)) == other
    assert one(logits[0], sequence(banned)) == logits[0].topk(2).indices[1]
    outcomes = sample(logits, [sequence(pushed), sequence(GREEDY)], EOS)
    assert [o.token_id for o in outcomes] == [other, int(logits[1].argmax())]


def test_a_bias_weighs_in_a_draw_as_its_exponential() -> None:
    logits = torch.zeros(V)
    bias = dict.fromkeys(range(2, V), -100.0) | {1: math.log(3)}
    sampling = SamplingParams(temperature=1.0, logit_bias=tuple(bias.items()))

    drawn = draws(logits, sampling)

    assert drawn.keys() == {0, 1}
    assert 2.4 < drawn[1] / drawn[0] < 3.7


def test_a_bias_comes_before_the_penalties() -> None:
    """As in vLLM: a repetition penalty divides what a bias has made positive."""
    logits = torch.full((V,), -5.0)
    logits[7] = 3.0
    sampling = SamplingParams(
        max_tokens=9, temperature=0.0, repetition_penalty=2.0, logit_bias=((4, 7.0),)
    )

    assert one(logits, sequence(sampling, prompt=(7,))) == 4  # 2 against 3 / 2
    assert one(logits, sequence(sampling, prompt=(4, 7))) == 7  # 2 / 2 against 3 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_of_equal_logits_the_first_token_wins_in_each_dtype(
    dtype: torch.dtype, num_rows: int
) -> None:
    """bfloat16 has few values, so that ties are common among 150,000 tokens."""
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randint(-3, 3, (num_rows, 1000), generator=generator).to(dtype)

    outcomes = sample(logits, [sequence(GREEDY)] * num_rows, EOS)

    firsts = [row.index(max(row)) for row in logits.float().tolist()]
    assert [outcome.token_id for outcome in outcomes] == firsts


def test_tokens_come_as_often_as_their_probability_says() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    counts = draws(torch.tensor(probabilities).log(), SamplingParams(temperature=1.0), 4000)

    for token, p in enumerate(probabilities):
        assert abs(counts[token] / 4000 - p) < 4.5 * math.sqrt(p * (1 - p) / 4000)


def test_temperature_divides_the_logits() -> None:
    counts = draws(torch.tensor([0.9, 0.1]).log(), SamplingParams(temperature=2.0), 4000)

    assert abs(counts[0] / 4000 - 0.75) < 0.03  # sqrt(0.9) : sqrt(0.1) = 3 : 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-60, 1e-40, 1e-9])
def test_a_tiny_temperature_is_nearly_greedy_and_not_zero_divided_by_zero(
    temperature: float,
) -> None:
    """As float32 1e-60 is 0, and 0/0 made every row answer token 0."""
    logits = random_logits(1)[0]
    logits[0] = -9.0

    assert one(logits, sequence(SamplingParams(temperature=temperature))) == int(logits.argmax())


def test_top_k_keeps_the_k_most_probable() -> None:
    logits = torch.linspace(0, 1, 10)

    assert set(draws(logits, SamplingParams(top_k=3), 600)) == {7, 8, 9}
    assert set(draws(logits, SamplingParams(top_k=10), 600)) == set(range(10))


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.96, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, expected: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    assert set(draws(logits, SamplingParams(top_p=top_p), 600)) == expected


@pytest.mark.parametrize(("min_p", "expected"), [(1.0, {0}), (0.5, {0, 1}), (0.05, {0, 1, 2, 3})])
def test_min_p_keeps_what_is_near_the_most_probable(min_p: float, expected: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    assert set(draws(logits, SamplingParams(min_p=min_p), 600)) == expected


@pytest.mark.parametrize("num_tokens", [1_024, 1_025, 5_000])
def test_a_nucleus_of_more_tokens_than_are_looked_at_first_is_whole(num_tokens: int) -> None:
    """All but one are equally probable, so that they make the nucleus together."""
    logits = torch.zeros(num_tokens)
    logits[7] = -20.0
    sampling = SamplingParams(top_p=0.9)

    drawn = {one(logits, sequence(sampling, seed=seed)) for seed in range(200)}

    assert 7 not in drawn
    assert len(drawn) > 150


def test_no_token_is_drawn_that_was_ruled_out_also_at_both_ends() -> None:
    logits = torch.full((100,), -math.inf)
    logits[[40, 60]] = 0.0

    counts = draws(logits, SamplingParams(), 400)

    assert set(counts) == {40, 60}
    assert min(counts.values()) > 150


def test_penalties_equal_a_case_worked_by_hand() -> None:
    """Prompt 0 and 1, output 1 twice and 2 once; repetition 2, frequency 0.5, presence 0.25.

    0: 4 / 2 = 2;  1: 6 / 2 - 2 * 0.5 - 0.25 = 1.75;  2: -1 * 2 - 0.5 - 0.25 = -2.75;  3 stays.
    """
    sampling = SamplingParams(
        temperature=0.0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25
    )
    logits = torch.tensor([4.0, 6.0, -1.0, 0.0])
    seq = sequence(sampling, prompt=(0, 1), output=(1, 1, 2))
    for value, expected in [(1.99, 0), (2.01, 3)]:
        logits[3] = value
        assert one(logits, seq) == expected
    logits[0] = -50.0  # 0 is out of the way: next comes 1
    for value, expected in [(1.74, 1), (1.76, 3)]:
        logits[3] = value
        assert one(logits, seq) == expected
    logits[1] = -50.0  # then 2
    for value, expected in [(-2.76, 2), (-2.74, 3)]:
        logits[3] = value
        assert one(logits, seq) == expected


def test_each_penalty_by_its_own() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])
    cases = [
        (SamplingParams(temperature=0.0, repetition_penalty=1.9), 0),
        (SamplingParams(temperature=0.0, repetition_penalty=2.1), 1),
        (SamplingParams(temperature=0.0, presence_penalty=0.9), 0),
        (SamplingParams(temperature=0.0, presence_penalty=1.1), 1),
        (SamplingParams(temperature=0.0, frequency_penalty=0.45), 0),
        (SamplingParams(temperature=0.0, frequency_penalty=0.55), 1),
    ]
    for sampling, expected in cases:
        assert one(logits, sequence(sampling, prompt=(2,), output=(0, 0))) == expected, sampling


def test_no_stop_token_comes_before_min_tokens() -> None:
    logits = torch.full((V,), -5.0)
    logits[3], logits[4], logits[5] = 9.0, 8.0, 7.0
    sampling = SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.0, stop_token_ids=(4, V + 7)
    )

    assert [one(logits, sequence(sampling, output=(9,) * n)) for n in range(3)] == [5, 5, 3]


def test_ignored_eos_is_not_blocked_by_min_tokens() -> None:
    logits = torch.zeros(V)
    logits[3] = 9.0
    sampling = SamplingParams(max_tokens=9, min_tokens=2, temperature=0.0, ignore_eos=True)

    assert one(logits, sequence(sampling)) == 3


def test_a_seed_repeats_and_seeds_and_positions_differ() -> None:
    logits = torch.zeros(1000)
    sampling = SamplingParams()

    def run(seed: int) -> list[int]:
        return [one(logits, sequence(sampling, seed=seed, output=(0,) * n)) for n in range(20)]

    assert run(5) == run(5)
    assert len({tuple(run(seed)) for seed in (*range(10), -1, 2**64 - 1)}) >= 11
    assert len(set(run(5))) > 15
    assert run(5)[1:] != run(6)[:-1], "a seed is not the next one shifted"


def test_a_row_is_the_same_alone_and_at_any_place_among_others() -> None:
    logits = random_logits(9, seed=4)
    sampling = SamplingParams(
        temperature=0.9, top_p=0.95, min_p=0.01, presence_penalty=0.3, repetition_penalty=1.1
    )
    mine = [sequence(sampling, seed=n, output=(n,)) for n in range(9)]
    alone = [one(logits[n], mine[n]) for n in range(9)]

    for shift in range(9):
        order = [(n + shift) % 9 for n in range(9)]
        outcomes = sample(logits[order], [mine[n] for n in order], EOS)
        assert [o.token_id for o in outcomes] == [alone[n] for n in order]


def test_rows_that_ask_for_different_things_do_not_see_each_other() -> None:
    """Each feature is computed for all rows that have it at once; more rows than are computed at once."""
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=3),
        SamplingParams(top_k=7, temperature=1.5),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.9, top_k=20),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=0.0, repetition_penalty=1.5),
        SamplingParams(max_tokens=9, min_tokens=5, temperature=0.0),
        SamplingParams(max_tokens=9, min_tokens=5, frequency_penalty=0.4, top_p=0.8, min_p=0.05),
    ]
    count = 7 * len(kinds)
    logits = random_logits(count, seed=8)
    mine = [sequence(kinds[n % len(kinds)], seed=n, output=(n % 5,)) for n in range(count)]

    outcomes = sample(logits, mine, EOS)

    assert [o.token_id for o in outcomes] == [one(logits[n], mine[n]) for n in range(count)]


@pytest.mark.parametrize("k", [1, 2, V - 1, V, V + 1])
def test_top_k_beside_rows_of_other_k_keeps_its_own(k: int) -> None:
    logits = random_logits(1, seed=3)[0]
    mates = [sequence(SamplingParams(top_k=other), seed=1) for other in (0, 5, V)]
    drawn = set()
    for seed in range(300):
        rows = [*mates, sequence(SamplingParams(top_k=k, temperature=2.0), seed=seed)]
        drawn.add(sample(logits.expand(4, V), rows, EOS)[-1].token_id)

    assert drawn <= set(logits.topk(min(k, V)).indices.tolist())
    assert len(drawn) > min(k, 20) // 2


def test_sampling_leaves_the_logits_of_others_and_its_own_as_they_are() -> None:
    logits = random_logits(3)
    before = logits.clone()
    penalised = SamplingParams(max_tokens=9, min_tokens=3, presence_penalty=1.0, top_k=2)

    sample(logits, [sequence(penalised, output=(1, 2))] * 3, EOS)

    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams()], ids=["greedy", "sampled"])
def test_a_non_finite_row_fails_alone(bad: float, sampling: SamplingParams) -> None:
    logits = random_logits(4)
    expected = sample(logits, [sequence(sampling, seed=9)] * 4, EOS)
    logits[2, 17] = bad

    outcomes = sample(logits, [sequence(sampling, seed=9)] * 4, EOS)

    assert outcomes[2].error is not None
    assert outcomes[2].token_id is None
    assert [o for n, o in enumerate(outcomes) if n != 2] == [
        o for n, o in enumerate(expected) if n != 2
    ]


def test_a_row_where_nothing_is_possible_fails() -> None:
    assert sample(torch.full((1, V), -math.inf), [sequence(GREEDY)], EOS)[0].error is not None


def test_ids_outside_of_the_logits_harm_nobody() -> None:
    """Checked against the tokenizer they are fine, and would write into a neighbour's logits."""
    sampling = SamplingParams(
        max_tokens=9,
        min_tokens=5,
        temperature=0.0,
        stop_token_ids=(V, V + 1),
        repetition_penalty=2.0,
        frequency_penalty=0.5,
    )
    seq = sequence(sampling, prompt=(V, V + 900), output=(V + 3,))
    logits = random_logits(2)
    logits[:, 3] = -9.0

    outcomes = sample(logits, [seq, sequence(GREEDY)], EOS)

    assert outcomes == [RowOutcome(token_id=t) for t in logits.argmax(-1).tolist()]


def test_no_rows_give_no_outcomes() -> None:
    assert sample(torch.empty(0, V), [], EOS) == []
