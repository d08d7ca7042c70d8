"""Baking gives the keys and values that transformers' own cache holds, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

from prefix_store.importers.recognition import Provenance, Recognition
from prefix_store.importers.soft_prompt import SoftPrompt
from server.model import baker
from server.model.attention import make_attention_backend
from server.model.baker import Baker
from server.model.loader import LoadedModel, adopt_model
from tests.engine_harness import Harness, generate_with_transformers, random_prefix
from tests.tiny_models import VOCAB, tiny_model

IDS = torch.arange(3, 50) % VOCAB


def bake(
    model: LoadedModel, prompt: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    provenance = Provenance("test", Recognition("a test"))
    given = SoftPrompt(prompt, provenance) if prompt.is_floating_point() else tuple(prompt.tolist())
    under_way = Baker(model, make_attention_backend("auto")).start(given)
    steps = 1
    while not under_way.step():
        steps += 1
    return *under_way.result(), steps


@pytest.mark.parametrize("chunk", [512, 10])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mistral", "gemma3_text"])
def test_baked_tokens_are_the_cache_of_transformers(
    architecture: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baker, "CHUNK_TOKENS", chunk)
    module = tiny_model(architecture)
    with torch.no_grad():
        cache = module(IDS[None], use_cache=True).past_key_values

    keys, values, steps = bake(adopt_model(module, model_id="tiny"), IDS)

    assert steps == -(-len(IDS) // chunk)
    for index, layer in enumerate(cache.layers):
        kept = layer.keys.shape[2]  # a sliding layer of transformers keeps its window only
        theirs = (layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1))
        for ours, expected in zip((keys[index], values[index]), theirs, strict=True):
            assert ours.shape[0] == len(IDS)
            assert torch.allclose(ours[-kept:], expected, atol=1e-5)


def test_embeddings_of_tokens_bake_to_what_the_tokens_do() -> None:
    module = tiny_model("llama")
    embeddings = module.get_input_embeddings()(IDS).detach()  # type: ignore[operator]
    model = adopt_model(module, model_id="tiny")

    for ours, theirs in zip(bake(model, IDS)[:2], bake(model, embeddings)[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_requests_under_way_do_not_notice_a_bake() -> None:
    module = tiny_model("llama")
    model = adopt_model(module, model_id="tiny")
    prefix, prompt = random_prefix(model, 20, seed=1), [5, 6, 7, 8]
    expected = generate_with_transformers(module, prompt, prefix, 8)

    harness = Harness(module)
    harness.add("r", prompt, prefix)
    for _ in range(5):
        harness.step()
    bake(harness.model, IDS)

    assert harness.run()["r", 0] == expected


def test_a_bake_that_fails_gives_the_model_back() -> None:
    model = adopt_model(tiny_model("llama"), model_id="tiny")
    serving = object()
    model.connect(serving)  # type: ignore[arg-type]
    under_way = Baker(model, make_attention_backend("auto")).start((VOCAB + 5,))
    with pytest.raises(IndexError):
        under_way.step()
    assert all(m.prefixd_attention is serving for m in model.module.modules())
