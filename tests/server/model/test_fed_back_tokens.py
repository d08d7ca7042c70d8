"""Tokens get to the rows that wait for them, whatever the order of rows in the two steps."""

from __future__ import annotations

import pytest
import torch

from server.engine.messages import ScheduledRow
from server.engine.sequence import PENDING, Sequence
from server.model.fed_back_tokens import FedBackTokens
from server.types import GenerationRequest, SamplingParams


def sequence(name: str) -> Sequence:
    return Sequence(GenerationRequest(name, (1,), SamplingParams()), 0, 0, 0.0)


def row(seq: Sequence, *token_ids: int) -> ScheduledRow:
    return ScheduledRow(seq, token_ids, 0, (), 0, 0, (), sample=True)


def test_each_row_gets_its_own_token_and_known_tokens_stay() -> None:
    a, b, c = map(sequence, "abc")
    fed_back = FedBackTokens()
    fed_back.keep([a, b], torch.tensor([11, 22]))
    rows = [row(b, PENDING), row(c, 7, 8, 9), row(a, 5, PENDING)]
    input_ids = torch.tensor([PENDING, 7, 8, 9, 5, PENDING, 0, 0])  # two that only fill the pack
    fed_back.fill(rows, input_ids)

    assert input_ids.tolist() == [22, 7, 8, 9, 5, 11, 0, 0]


def test_a_row_that_failed_goes_on_with_a_token_that_there_is() -> None:
    a = sequence("a")
    fed_back = FedBackTokens()
    fed_back.keep([a], torch.tensor([-1]))
    input_ids = torch.tensor([PENDING])
    fed_back.fill([row(a, PENDING)], input_ids)

    assert input_ids.tolist() == [0]


def test_a_token_that_the_step_before_did_not_sample_is_our_own_bug() -> None:
    fed_back = FedBackTokens()
    fed_back.keep([sequence("a")], torch.tensor([3]))
    with pytest.raises(KeyError):
        fed_back.fill([row(sequence("b"), PENDING)], torch.tensor([PENDING]))
