"""Log-probabilities are those of transformers' own logits, however a prompt is cut, cached, batched or computed again."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from prefix_store.artifact import Prefix
from server.engine.messages import MAX_TOLD_TOKENS
from server.model.loader import adopt_model
from server.types import SamplingParams, TokenLogprob
from tests.engine_harness import Harness, random_prefix
from tests.tiny_models import VOCAB, tiny_model

TOLERANCE = 2e-4
PROMPT = random.Random(5).choices(range(1, VOCAB), k=90)
ASKING = SamplingParams(
    max_tokens=5, temperature=0.0, logprobs=3, prompt_logprobs=2, ignore_eos=True
)


def reference(module: nn.Module, tokens: list[int], prefix: Prefix | None) -> Tensor:
    """Log-probabilities [n, V] of what follows each token, by the model's own eager attention."""
    cache, start = DynamicCache(), 0
    if prefix is not None:
        start = prefix.manifest.first_position
        for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
    module.set_attn_implementation("eager")  # type: ignore[operator] # transformers' method
    with torch.inference_mode():
        logits: Tensor = module(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.arange(start, start + len(tokens))[None],
            past_key_values=cache,
        ).logits[0]
    return logits.log_softmax(-1)


def check(entries: list[TokenLogprob], tokens: list[int], expected: Tensor, num_top: int) -> None:
    """`entries[i]` is of `tokens[i]`, which follows what `expected[i]` is of."""
    assert [entry.token_id for entry in entries] == tokens
    for entry, row in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=TOLERANCE)
        best = row.topk(num_top).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best, abs=TOLERANCE)
        for token_id, value in entry.top:
            assert value == pytest.approx(float(row[token_id]), abs=TOLERANCE)


def check_request(
    harness: Harness,
    module: nn.Module,
    name: str,
    prefix: Prefix | None,
    prompt: list[int] = PROMPT,
) -> None:
    """All that the request was told, of its prompt and of its answer."""
    first, *rest = harness.outputs[name, 0]
    answer = harness.tokens[name, 0]
    expected = reference(module, prompt + answer, prefix)
    check(list(first.prompt_logprobs), prompt[1:], expected[: len(prompt) - 1], 2)
    told = [output.logprob for output in (first, *rest) if output.logprob is not None]
    check(told, answer, expected[len(prompt) - 1 : -1], 3)
    assert all(not output.prompt_logprobs for output in rest), "they are told once"


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("num_virtual_tokens", [0, 7])
def test_prompt_and_answer_are_told_as_transformers_has_them(
    architecture: str, num_virtual_tokens: int
) -> None:
    module = tiny_model(architecture)
    harness = Harness(tiny_model(architecture), max_num_batched_tokens=256)
    prefix = None
    if num_virtual_tokens:
        prefix = random_prefix(adopt_model(tiny_model(architecture), model_id="x"), 7, seed=1)
    harness.add("a", PROMPT, prefix, ASKING)
    harness.run()

    assert len(PROMPT) > MAX_TOLD_TOKENS, "a step tells of less than the prompt"
    check_request(harness, module, "a", prefix)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("max_num_batched_tokens", [16, 17, 64, 89, 256])
def test_how_a_prompt_is_cut_changes_nothing(overlapped: bool, max_num_batched_tokens: int) -> None:
    module = tiny_model("llama")
    harness = Harness(
        tiny_model("llama"), max_num_batched_tokens=max_num_batched_tokens, overlapped=overlapped
    )
    harness.add("a", PROMPT, None, ASKING)
    harness.add("b", PROMPT[:9], None, SamplingParams(max_tokens=12, temperature=0.0))
    harness.add("c", PROMPT, None, ASKING)
    harness.run()

    check_request(harness, module, "a", None)
    check_request(harness, module, "c", None)
    assert all(output.logprob is None for output in harness.outputs["b", 0])


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_prompt_that_is_cached_is_computed_again_and_serves_others_after(
    overlapped: bool,
) -> None:
    """The cache has keys and values; what the model found at those tokens it does not have."""
    module = tiny_model("llama")
    harness = Harness(tiny_model("llama"), overlapped=overlapped)
    plain = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    harness.add("before", PROMPT, None, plain)
    harness.run()
    harness.add("a", PROMPT, None, ASKING)
    harness.run()
    hits = harness.num_hit_tokens
    harness.add("after", PROMPT, None, plain)
    harness.run()

    check_request(harness, module, "a", None)
    assert harness.outputs["a", 0][0].num_cached_tokens == 0
    assert hits == 0
    assert harness.num_hit_tokens == 80, "all full blocks but the last token's"
    assert harness.tokens["a", 0] == harness.tokens["before", 0] == harness.tokens["after", 0]


@pytest.mark.parametrize("overlapped", [False, True])
def test_who_asks_for_the_answer_alone_may_read_a_cached_prompt(overlapped: bool) -> None:
    module = tiny_model("llama")
    harness = Harness(tiny_model("llama"), overlapped=overlapped)
    asking = SamplingParams(max_tokens=5, temperature=0.0, logprobs=3, ignore_eos=True)
    harness.add("before", PROMPT, None, asking)
    harness.run()
    harness.add("a", PROMPT, None, asking)
    harness.run()

    assert harness.num_hit_tokens == 80
    answer = harness.tokens["a", 0]
    expected = reference(module, PROMPT + answer, None)
    told = [o.logprob for o in harness.outputs["a", 0] if o.logprob is not None]
    check(told, answer, expected[len(PROMPT) - 1 : -1], 3)


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_preemption_loses_and_repeats_nothing(overlapped: bool) -> None:
    """The pool holds one of them with its answer, so the younger is thrown out and computed again."""
    module = tiny_model("llama")
    asking = SamplingParams(
        max_tokens=40, temperature=0.0, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    harness = Harness(
        tiny_model("llama"), num_blocks=15, max_num_batched_tokens=32, overlapped=overlapped
    )
    prompts = {"a": PROMPT, "b": PROMPT[::-1]}
    for name, prompt in prompts.items():
        harness.add(name, prompt, None, asking)
    harness.run()

    assert harness.num_preemptions > 0
    for name, prompt in prompts.items():
        check_request(harness, module, name, None, prompt)


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    harness = Harness(tiny_model("llama"))
    harness.add("a", PROMPT[:1], None, ASKING)
    harness.run()

    assert harness.outputs["a", 0][0].prompt_logprobs == ()
    assert harness.outputs["a", 0][0].logprob is not None


def test_all_choices_of_a_request_are_told_of_the_prompt() -> None:
    harness = Harness(tiny_model("llama"))
    asking = SamplingParams(max_tokens=2, temperature=1.0, prompt_logprobs=0, n=2)
    harness.add("a", PROMPT, None, asking)
    harness.run()

    first, second = (harness.outputs["a", index][0].prompt_logprobs for index in range(2))
    assert len(first) == len(PROMPT) - 1
    assert [e.logprob for e in second] == pytest.approx([e.logprob for e in first], abs=TOLERANCE)


def test_bias_and_temperature_change_what_is_drawn_and_not_what_is_told() -> None:
    module = tiny_model("llama")
    harness = Harness(tiny_model("llama"))
    asking = SamplingParams(max_tokens=1, temperature=2.0, logprobs=1, logit_bias=((7, 100.0),))
    harness.add("a", PROMPT, None, asking)
    harness.run()

    (entry,) = [o.logprob for o in harness.outputs["a", 0] if o.logprob is not None]
    assert entry.token_id == 7
    check([entry], [7], reference(module, PROMPT, None)[-1:], 1)
