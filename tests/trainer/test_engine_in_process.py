"""The server's engine around a model that is being trained: the same answers, and the model comes back whole."""

from __future__ import annotations

import dataclasses
import gc
import time
import weakref
from typing import Any

import pytest
import torch

import demo
from prefix_store.artifact import decode, encode
from prefix_store.errors import PrefixRejected
from prefix_store.importers.native import native_artifact
from prefix_store.importers.recognition import Provenance, Recognition
from prefix_store.spec import digest_of
from server.engine.tokenizer import Tokenizer
from server.kvcache.kv_cache import KVCache
from server.model.loader import LoadedModel, adopt_model
from server.types import FinishReason, SamplingParams
from tests.engine_harness import generate_with_transformers, random_prefix
from tests.tiny_models import tiny_model
from tests.trainer.demo_data import bundled
from trainer.engine_in_process import EngineInProcess, Prompt
from trainer.errors import TrainerError
from trainer.likelihood import TextToScore

GREEDY = SamplingParams(max_tokens=64, temperature=0.0)


def sample_prompts(tokenizer: Tokenizer) -> list[Prompt]:
    return [Prompt(tokenizer.encode(s.prompt), bundled(s.task)) for s in demo.load_samples()]


def test_prefixes_of_many_tasks_answer_in_one_batch_as_the_server_answers(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    found = demo_engine.generate(sample_prompts(demo_tokenizer), GREEDY)

    assert [c.text for c in found] == [sample.completion for sample in demo.load_samples()]
    assert {c.finish_reason for c in found} == {FinishReason.STOP}


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_tokens_are_those_of_transformers_with_the_same_prefix(
    architecture: str, demo_tokenizer: Tokenizer
) -> None:
    model = adopt_model(tiny_model(architecture), model_id="tiny")
    engine = EngineInProcess(model, demo_tokenizer, max_num_seqs=3)
    prefix = random_prefix(model, 7, seed=3)
    artifact = native_artifact(
        engine.base, prefix.keys, prefix.values, Provenance("test", Recognition("a test"))
    )
    prompts = [[5, 9, 11], [4] * 20, [7, 8], [100, 3, 50, 60], [12]]
    sampling = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)

    with_prefix = engine.generate([Prompt(tuple(p), artifact) for p in prompts], sampling)
    without = engine.generate([Prompt(tuple(p)) for p in prompts], sampling)

    for prompt, ours, bare in zip(prompts, with_prefix, without, strict=True):
        expected = generate_with_transformers(model.module, prompt, prefix, 9)
        assert list(ours.token_ids) == expected
        assert list(bare.token_ids) == generate_with_transformers(model.module, prompt, None, 9)


def test_a_fitting_completion_ends_at_the_last_position_and_others_are_refused(
    demo_tokenizer: Tokenizer,
) -> None:
    model = adopt_model(tiny_model("gpt2", n_positions=32), model_id="tiny")
    engine = EngineInProcess(model, demo_tokenizer)
    prefix = random_prefix(model, 7, seed=3)
    artifact = native_artifact(
        engine.base, prefix.keys, prefix.values, Provenance("test", Recognition("a test"))
    )
    prompts = [Prompt((5,) * 20, artifact), Prompt((5,) * 20), Prompt((5,), artifact)]
    sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)

    found = engine.generate(prompts, sampling, fitting=True)

    assert [len(completion.token_ids) for completion in found] == [32 - 7 - 20, 32 - 20, 16]
    with pytest.raises(TrainerError, match=r"prompt 1: .*expected at most 32"):
        engine.generate(prompts, sampling)


def test_more_prompts_than_the_engine_takes_at_once_keep_their_order(
    demo_model: LoadedModel, demo_tokenizer: Tokenizer
) -> None:
    engine = EngineInProcess(demo_model, demo_tokenizer, max_num_seqs=2)
    prompts = sample_prompts(demo_tokenizer) * 2
    seen: list[tuple[int, int]] = []

    found = engine.generate(prompts, GREEDY, lambda done, total: seen.append((done, total)))

    assert [c.text for c in found] == [sample.completion for sample in demo.load_samples()] * 2
    assert seen == [(number, 10) for number in range(1, 11)]


def test_sampling_is_repeatable(demo_engine: EngineInProcess, demo_tokenizer: Tokenizer) -> None:
    prompts = [Prompt(demo_tokenizer.encode("name = "))] * 3
    warm = SamplingParams(max_tokens=20, temperature=1.0, seed=4)
    assert demo_engine.generate(prompts, warm) == demo_engine.generate(prompts, warm)


def test_the_models_own_attention_is_back_and_trains_as_before(
    demo_model: LoadedModel, demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    module: Any = demo_model.module
    ids = torch.tensor([demo_tokenizer.encode("Lomu is a diner in the old town.")])

    def gradient() -> torch.Tensor:
        embedded = module.get_input_embeddings()(ids).requires_grad_()
        module(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
        assert embedded.grad is not None
        grad: torch.Tensor = embedded.grad
        return grad

    before = gradient()
    demo_engine.generate(sample_prompts(demo_tokenizer), GREEDY)
    demo_engine.token_losses(bundled("sentiment"), [TextToScore((5,), (6, 7))])

    assert module.config._attn_implementation == "sdpa"
    assert torch.equal(gradient(), before)


def test_attention_is_handed_back_after_a_refusal_too(
    demo_model: LoadedModel, demo_engine: EngineInProcess
) -> None:
    with pytest.raises(TrainerError):
        demo_engine.generate([Prompt(())], GREEDY)
    assert demo_model.module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_no_kv_pool_outlives_a_call(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a training run that evaluates now and then fills the device."""
    pools: list[weakref.ref[KVCache]] = []
    build = KVCache.__init__

    def noted(self: KVCache, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        pools.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", noted)
    demo_engine.generate(sample_prompts(demo_tokenizer), GREEDY)
    demo_engine.token_losses(None, [TextToScore((5,), (6, 7))])
    gc.collect()

    assert len(pools) == 2
    assert [pool() for pool in pools] == [None, None]


def test_no_prefix_outlives_a_call(demo_engine: EngineInProcess, demo_tokenizer: Tokenizer) -> None:
    demo_engine.generate(sample_prompts(demo_tokenizer), GREEDY)
    stats = demo_engine._store.stats()
    assert (stats.host_bytes, stats.disk_bytes) == (0, 0)


def test_a_prefix_that_a_server_would_refuse_can_not_be_judged(
    demo_engine: EngineInProcess,
) -> None:
    prefix = decode(bundled("sentiment"), digest_of(bundled("sentiment")))
    broken = encode(prefix.manifest, [k * float("nan") for k in prefix.keys], prefix.values)
    with pytest.raises(PrefixRejected):
        demo_engine.generate([Prompt((5,), broken)], GREEDY)


@pytest.mark.parametrize(
    ("token_ids", "said"),
    [((), "at least one token"), ((5,) * 600, "prompt 2: "), ((99_999,), "token id 99999")],
)
def test_a_prompt_that_can_not_run_is_named(
    demo_engine: EngineInProcess, token_ids: tuple[int, ...], said: str
) -> None:
    with pytest.raises(TrainerError, match=said):
        demo_engine.generate([Prompt((5,)), Prompt(token_ids)], GREEDY)


def test_a_text_beyond_the_models_positions_is_named(demo_engine: EngineInProcess) -> None:
    fits, long = TextToScore((5,), (6,)), TextToScore((5,), (6,) * 600)
    with pytest.raises(TrainerError, match=r"text 2: 600 tokens from position 0; .* 512"):
        demo_engine.token_losses(None, [fits, long])


def test_variables_of_a_server_do_not_change_an_evaluation(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PORT": "no number", "MAX_MODEL_LEN": "3", "PIN": "nobody"}.items():
        monkeypatch.setenv(f"PREFIXD_{name}", value)
    [found] = demo_engine.generate(sample_prompts(demo_tokenizer)[:1], GREEDY)
    assert found.text == demo.load_samples()[0].completion


def test_a_base_that_the_caller_knows_is_not_read_again(
    demo_model: LoadedModel, demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    known = dataclasses.replace(demo_engine.base, model_id="known")
    assert EngineInProcess(demo_model, demo_tokenizer, base=known).base is known


def test_each_prompt_may_have_a_seed_of_its_own(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    ids = demo_tokenizer.encode("Lomu is")
    sampling = SamplingParams(max_tokens=12, temperature=1.5)
    seeds = [1, 2, 1, 3]

    found = demo_engine.generate([Prompt(ids, seed=seed) for seed in seeds], sampling)

    assert found[0].token_ids == found[2].token_ids
    assert len({completion.token_ids for completion in found}) == 3


def test_one_by_one_no_prompt_waits_for_another(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    prompts = sample_prompts(demo_tokenizer)

    began = time.monotonic()
    alone = demo_engine.generate(prompts, GREEDY, one_by_one=True)
    took = time.monotonic() - began

    together = demo_engine.generate(prompts, GREEDY)
    assert [c.text for c in alone] == [c.text for c in together]
    assert all(completion.first_token_seconds > 0 for completion in alone)
    # Had all been submitted at the beginning, the waits would add up to a multiple of the whole.
    assert sum(completion.first_token_seconds for completion in alone) < took
