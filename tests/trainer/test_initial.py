"""What a prefix begins as."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.engine.tokenizer import Tokenizer
from tests.tiny_model_dir import tiny_tokenizer
from tests.trainer.runs import random_examples, tiny_base
from tests.trainer.test_encoding import with_begin_token
from trainer.config import TrainConfig
from trainer.encoding import EncodedExample
from trainer.initial import example_token_ids, initial_prefix, num_virtual_tokens, text_token_ids

TEXT = "the quick brown fox"


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(data="d.jsonl", output="run", **settings)


def test_a_text_of_its_own_length_is_taken_whole() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    whole = tokenizer.encode(TEXT)

    assert text_token_ids(tokenizer, TEXT, None) == whole
    assert text_token_ids(tokenizer, TEXT, len(whole)) == whole
    assert num_virtual_tokens(tokenizer, config(init_text=TEXT)) == len(whole)
    assert num_virtual_tokens(tokenizer, config(init_text=TEXT, num_virtual_tokens=3)) == 3
    assert num_virtual_tokens(tokenizer, config()) == 16


def test_a_text_is_repeated_or_cut_so_that_its_end_stands_last() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    whole = tokenizer.encode(TEXT)

    assert text_token_ids(tokenizer, TEXT, 2) == whole[-2:]
    longer = text_token_ids(tokenizer, TEXT, 2 * len(whole) + 1)
    assert longer == (whole[-1], *whole, *whole)


def test_a_begin_token_stays_first_and_comes_once() -> None:
    tokenizer = Tokenizer(with_begin_token())
    plain = Tokenizer(tiny_tokenizer()).encode(TEXT)

    longer = text_token_ids(tokenizer, TEXT, 2 * len(plain) + 1)
    assert longer == (1, *plain, *plain)
    assert text_token_ids(tokenizer, TEXT, 3) == (1, *plain[-2:])


def test_examples_follow_each_other_behind_one_begin_token() -> None:
    tokenizer = Tokenizer(with_begin_token())
    examples = [EncodedExample((1, 10, 11), (12, 2), ""), EncodedExample((1, 20), (21, 2), "")]

    assert example_token_ids(tokenizer, examples, 8) == (1, 10, 11, 12, 2, 20, 21, 2)
    assert example_token_ids(tokenizer, examples, 4) == (1, 11, 12, 2)


@pytest.mark.parametrize("kind", ["examples", "vocabulary", "random"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_each_beginning_has_the_shapes_of_the_base_and_natural_sizes(
    architecture: str, kind: Any
) -> None:
    base = tiny_base(architecture)

    begun = initial_prefix(base, config(init=kind, num_virtual_tokens=40), random_examples(9))

    layout = base.spec.layout.layers
    shapes = [(40, layer.num_kv_heads, layer.key_dim) for layer in layout]
    assert [tuple(key.shape) for key in begun.key_values.keys] == shapes
    assert [tuple(value.shape) for value in begun.key_values.values] == shapes
    assert begun.embeddings.shape == (40, base.spec.hidden_size)
    assert (begun.token_ids is None) == (kind == "random")
    natural = initial_prefix(
        base, config(init="vocabulary", num_virtual_tokens=64, seed=7), random_examples(9)
    )
    for drawn, usual in zip(begun.key_values.tensors, natural.key_values.tensors, strict=True):
        ratio = float(drawn.square().mean().sqrt() / usual.square().mean().sqrt())
        assert 0.4 < ratio < 2.5


def test_the_seed_decides_what_is_drawn() -> None:
    base = tiny_base()

    def keys(seed: int, kind: Any) -> torch.Tensor:
        begun = initial_prefix(base, config(init=kind, seed=seed), [])
        return begun.key_values.keys[0]

    for kind in ("vocabulary", "random"):
        assert torch.equal(keys(1, kind), keys(1, kind))
        assert not torch.equal(keys(1, kind), keys(2, kind))
