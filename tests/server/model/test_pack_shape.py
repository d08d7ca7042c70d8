"""How far a pack is padded."""

from __future__ import annotations

import pytest

from server.model.pack_shape import AS_IT_IS, PackShape


@pytest.mark.parametrize("num_tokens", [1, 7, 512])
def test_a_pack_stays_as_it_is_where_nothing_is_asked(num_tokens: int) -> None:
    assert AS_IT_IS.padded(num_tokens) == num_tokens


def test_a_lone_token_gets_a_mate() -> None:
    shape = PackShape(min_tokens=2, widths=(896, 4864))

    assert [shape.padded(n) for n in (1, 2, 3, 33)] == [2, 2, 3, 33]


def test_widths_that_are_no_whole_vectors_are_made_whole_by_several_tokens() -> None:
    """80 = 64 + 16: four tokens of 80 values are five vectors."""
    shape = PackShape(min_tokens=2, widths=(48, 80))

    assert [shape.padded(n) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("width", [768, 896, 3072, 4864, 8192, 14336])
def test_every_share_of_a_thread_ends_on_a_whole_vector(num_threads: int, width: int) -> None:
    shape = PackShape(min_tokens=2, widths=(width,), num_threads=num_threads)
    for num_tokens in range(1, 600):
        padded = shape.padded(num_tokens)
        num_values = padded * width
        num_shares = min(num_threads, -(-num_values // 32_768))

        assert num_tokens <= padded <= max(num_tokens + num_threads, 2)
        assert num_values % num_shares == 0
        assert num_values // num_shares % 64 == 0
