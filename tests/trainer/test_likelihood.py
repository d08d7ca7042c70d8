"""The loss through the engine's packed path is the loss of transformers' own attention."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from prefix_store.artifact import Prefix
from server.model.loader import LoadedModel, adopt_model
from tests.engine_harness import random_prefix
from tests.tiny_models import VOCAB, tiny_model
from trainer import likelihood
from trainer.engine_in_process import own_attention
from trainer.likelihood import TextToScore, token_losses


def random_text(rng: random.Random, num_context: int, num_targets: int) -> TextToScore:
    ids = [rng.randrange(3, VOCAB) for _ in range(num_context + num_targets)]
    return TextToScore(tuple(ids[:num_context]), tuple(ids[num_context:]))


@torch.inference_mode()
def transformers_losses(model: LoadedModel, prefix: Prefix | None, text: TextToScore) -> Any:
    """Of one text alone, the prefix as `past_key_values`."""
    cache, first = DynamicCache(), 0
    if prefix is not None:
        first = prefix.manifest.first_position
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    module: Any = model.module
    module.set_attn_implementation("eager")
    ids = torch.tensor([text.fed])
    positions = torch.arange(first, first + ids.shape[1])[None]
    logits = module(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits[0]
    targets = torch.tensor(text.target_token_ids)
    return cross_entropy(logits[-len(targets) :].float(), targets, reduction="none")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("num_virtual_tokens", [0, 19])
def test_losses_are_those_of_transformers(architecture: str, num_virtual_tokens: int) -> None:
    model = adopt_model(tiny_model(architecture), model_id="tiny")
    prefix = random_prefix(model, num_virtual_tokens, seed=1) if num_virtual_tokens else None
    rng = random.Random(0)
    texts = [random_text(rng, rng.randint(1, 30), rng.randint(1, 20)) for _ in range(30)]

    with own_attention(model):
        found = token_losses(model, prefix, texts)

    for nats, text in zip(found, texts, strict=True):
        torch.testing.assert_close(
            nats, transformers_losses(model, prefix, text), atol=2e-4, rtol=1e-4
        )


def test_a_text_that_is_cut_into_pieces_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces end before, at and behind the first target, and the context alone fills whole packs."""
    monkeypatch.setattr(likelihood, "PACK_TOKENS", 16)
    model = adopt_model(tiny_model("llama"), model_id="tiny")
    prefix = random_prefix(model, 5, seed=2)
    rng = random.Random(1)
    shapes = [(3, 2), (50, 7), (17, 1), (1, 60), (16, 16), (33, 3)]
    texts = [random_text(rng, *shape) for shape in shapes]

    with own_attention(model):
        found = token_losses(model, prefix, texts)

    assert [len(nats) for nats in found] == [targets for _, targets in shapes]
    for nats, text in zip(found, texts, strict=True):
        torch.testing.assert_close(
            nats, transformers_losses(model, prefix, text), atol=2e-4, rtol=1e-4
        )
