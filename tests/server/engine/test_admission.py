"""What a request may ask for at most, said in two ways that must agree."""

from __future__ import annotations

import pytest

from server.engine.admission import EngineLimits
from server.errors import ContextTooLong
from server.types import GenerationRequest, PrefixRef, SamplingParams


@pytest.mark.parametrize("position_limit", [None, 60])
@pytest.mark.parametrize("first_position", [9, 40])
@pytest.mark.parametrize("num_virtual_tokens", [0, 9])
@pytest.mark.parametrize("pool_blocks", [5, 30])
def test_an_answer_as_long_as_the_room_is_accepted_and_a_longer_one_is_not(
    position_limit: int | None, first_position: int, num_virtual_tokens: int, pool_blocks: int
) -> None:
    limits = EngineLimits(
        max_model_len=64,
        position_limit=position_limit,
        pool_blocks=pool_blocks,
        block_size=8,
        vocab_size=100,
        max_num_queued=1,
    )
    prefix = PrefixRef("task", 1, "sha256:0", num_virtual_tokens, first_position)
    ref = prefix if num_virtual_tokens else None

    def request(max_tokens: int) -> GenerationRequest:
        return GenerationRequest("id", (1,) * 4, SamplingParams(max_tokens=max_tokens), ref)

    room = limits.room(ref, 4)
    limits.check(request(room))
    with pytest.raises(ContextTooLong):
        limits.check(request(room + 1))
