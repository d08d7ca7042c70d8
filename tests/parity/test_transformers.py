"""The first promise: at temperature 0 the engine gives the tokens that transformers gives."""

from __future__ import annotations

import random

import pytest
import torch

from prefix_store.artifact import Prefix
from server.engine.messages import ScheduledRow
from server.model.attention import make_attention_backend
from server.model.loader import adopt_model
from server.model.self_check import self_check
from server.types import SamplingParams
from tests.engine_harness import Harness, generate_with_transformers, random_prefix
from tests.kernel_support import KERNEL_DEVICE, device_of, needs_triton
from tests.tiny_models import ARCHITECTURES, VOCAB, tiny_model

PREFIX_LENGTHS = (1, 5, 16, 37, 130)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def _prompt(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(3, VOCAB) for _ in range(length)]


@pytest.mark.parametrize("as_served", [False, True], ids=["plain", "as served on a CPU"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_equal_those_of_transformers_for_every_prefix_length(
    architecture: str, as_served: bool
) -> None:
    module = tiny_model(architecture)
    model = adopt_model(module, model_id="tiny")
    jobs = [(p, random_prefix(model, p, seed=p)) for p in PREFIX_LENGTHS] + [(0, None)]
    expected = {
        str(p): generate_with_transformers(module, _prompt(p, 9 + p % 7), prefix, 12)
        for p, prefix in jobs
    }
    assert len({tuple(t) for t in expected.values()}) > 3, (
        "the model is too dull to tell tasks apart"
    )

    harness = Harness(module, merged=as_served, prepacked=as_served)
    for p, prefix in jobs:
        harness.add(str(p), _prompt(p, 9 + p % 7), prefix, GREEDY)

    assert {k: v for (k, _), v in harness.run().items()} == expected
    idle = harness.cached.num_evictable_blocks
    assert harness.blocks.num_used - idle == harness.resident.num_blocks, "a request kept blocks"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_equal_those_of_transformers_on_a_gpu(architecture: str) -> None:
    module = tiny_model(architecture).cuda()
    model = adopt_model(module, model_id="tiny")
    prefix, prompt = random_prefix(model, 37, seed=37), _prompt(1, 12)
    expected = generate_with_transformers(module, prompt, prefix, 12)

    harness = Harness(module)
    for i in range(3):
        harness.add(str(i), prompt, prefix, GREEDY)

    assert set(map(tuple, harness.run().values())) == {tuple(expected)}


@pytest.mark.parametrize(
    "attention", ["reference", "sdpa", pytest.param("triton", marks=needs_triton)]
)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_each_attention_backend_passes_the_check_at_load(architecture: str, attention: str) -> None:
    device = device_of(attention)
    model = adopt_model(tiny_model(architecture).to(device), model_id="tiny")

    assert self_check(model, make_attention_backend(attention, device)) < 1e-4


@needs_triton
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_kernels_give_the_tokens_of_transformers_in_a_batch_of_tasks(architecture: str) -> None:
    """A prefix that is shared by three rows, one that is short, a request without; one layer kind with a window."""
    module = tiny_model(architecture).to(KERNEL_DEVICE)
    model = adopt_model(module, model_id="tiny")
    greedy = SamplingParams(max_tokens=4, temperature=0.0)
    long, short = random_prefix(model, 37, seed=37), random_prefix(model, 5, seed=5)
    jobs = {"a": long, "b": long, "c": short, "d": None, "e": long}
    prompts = {name: _prompt(i, 3 + i) for i, name in enumerate(jobs)}
    expected = {
        name: generate_with_transformers(module, prompts[name], prefix, 4)
        for name, prefix in jobs.items()
    }

    harness = Harness(module, attention="triton")
    for name, prefix in jobs.items():
        harness.add(name, prompts[name], prefix, greedy)

    assert {name: tokens for (name, _), tokens in harness.run().items()} == expected


@pytest.mark.parametrize("num_blocks", [200, 26], ids=["roomy", "tight"])
def test_a_mixed_batch_equals_each_request_alone(num_blocks: int) -> None:
    """8 tasks and 2 without, arriving one by one; the tight pool preempts, evicts and reloads."""
    module = tiny_model("llama")
    model = adopt_model(module, model_id="tiny")
    lengths = [1, 5, 16, 37, 60, 22, 9, 33]
    prefixes = [random_prefix(model, n, seed=100 + n) for n in lengths]
    jobs = [
        (f"t{i}", _prompt(i, 5 + 11 * i % 40), p) for i, p in enumerate([*prefixes, None, None])
    ]
    sampling = SamplingParams(max_tokens=40, temperature=0.0)
    expected = {
        name: generate_with_transformers(module, prompt, prefix, 40)
        for name, prompt, prefix in jobs
    }

    harness = Harness(module, num_blocks=num_blocks, block_size=8, max_num_batched_tokens=32)
    for repeat in range(2):
        for name, prompt, prefix in jobs:
            harness.add(f"{name}.{repeat}", prompt, prefix, sampling)
            for _ in range(3):
                harness.step()
    tokens = harness.run(max_steps=5000)

    assert {k: v for (k, _), v in tokens.items()} == {
        f"{name}.{r}": t for name, t in expected.items() for r in range(2)
    }
    if num_blocks < 100:
        assert harness.num_preemptions > 0
        assert harness.num_evictions > 0
        assert harness.num_loads > len(prefixes), "nothing was reloaded"


def test_a_long_prompt_is_the_same_in_chunks_of_any_size() -> None:
    module = tiny_model("mistral")
    model = adopt_model(module, model_id="tiny")
    prefix, prompt = random_prefix(model, 37, seed=3), _prompt(0, 100)
    expected = generate_with_transformers(module, prompt, prefix, 12)

    for budget in (16, 17, 33, 128):
        harness = Harness(module, max_num_batched_tokens=budget)
        harness.add("a", prompt, prefix, GREEDY)
        assert harness.run()["a", 0] == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_that_begin_alike_give_the_tokens_of_transformers_from_the_cache(
    architecture: str,
) -> None:
    """Behind a prefix of no whole blocks, behind none, as the next turn of a conversation, and the very same prompt."""
    module = tiny_model(architecture)
    model = adopt_model(module, model_id="tiny")
    prefix, system = random_prefix(model, 37, seed=37), _prompt(3, 48)
    asked: list[tuple[str, Prefix | None, list[int], int]] = []
    for name, behind in (("task ", prefix), ("base ", None)):
        first = [*system, 7, 8, 9]
        then = [*first, *generate_with_transformers(module, first, behind, 12), *_prompt(4, 5)]
        asked += [
            (name + "first", behind, first, 0),
            (name + "same", behind, system, 32),
            (name + "other", behind, [*system, 11], 48),
            (name + "then", behind, then, 48),
        ]
    expected = {
        name: generate_with_transformers(module, prompt, behind, 12)
        for name, behind, prompt, _ in asked
    }

    harness = Harness(module, prepacked=True)
    for name, behind, prompt, num_cached_tokens in asked:
        harness.add(name, prompt, behind, GREEDY)
        assert harness.run()[name, 0] == expected[name], name
        assert harness.finished[name, 0].num_cached_tokens == num_cached_tokens


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_next_turn_reads_the_answer_from_the_cache(architecture: str) -> None:
    module = tiny_model(architecture)
    first = _prompt(3, 21)
    greedy = SamplingParams(max_tokens=40, temperature=0.0)
    expected = generate_with_transformers(module, first, None, 40)
    then = [*first, *expected, 5]
    expected_then = generate_with_transformers(module, then, None, 40)

    harness = Harness(module, prepacked=True)
    harness.add("first", first, None, greedy)
    assert harness.run()["first", 0] == expected
    harness.add("then", then, None, greedy)
    assert harness.run()["then", 0] == expected_then
    assert harness.finished["then", 0].num_cached_tokens == 48, "21 of the prompt, 27 of the answer"


def test_replacing_and_evicting_a_version_does_not_touch_requests_that_began_with_it() -> None:
    module = tiny_model("llama")
    model = adopt_model(module, model_id="tiny")
    old, new = random_prefix(model, 20, seed=1), random_prefix(model, 30, seed=2)
    prompt = _prompt(5, 10)
    sampling = SamplingParams(max_tokens=30, temperature=0.0)
    expected_old = generate_with_transformers(module, prompt, old, 30)
    expected_new = generate_with_transformers(module, prompt, new, 30)

    harness = Harness(module)
    harness.add("old", prompt, old, sampling)
    for _ in range(8):
        harness.step()
    harness.evict(old)
    harness.add("new", prompt, new, sampling)
    harness.step()
    assert old.digest in harness.resident, "a leased prefix stays until its request ends"
    tokens = harness.run()

    assert tokens["old", 0] == expected_old
    assert tokens["new", 0] == expected_new
    assert expected_old != expected_new
    assert old.digest not in harness.resident


def test_a_row_that_goes_non_finite_fails_alone_and_leaves_nothing_behind() -> None:
    module = tiny_model("llama")
    model = adopt_model(module, model_id="tiny")
    good, bad = random_prefix(model, 17, seed=1), random_prefix(model, 17, seed=2)
    bad.values[1].fill_(float("nan"))
    prompt = _prompt(1, 10)
    expected = generate_with_transformers(module, prompt, good, 12)

    harness = Harness(module)
    harness.add("bad", prompt, bad, GREEDY)
    harness.add("good", prompt, good, GREEDY)
    harness.run()
    harness.evict(bad)
    harness.add("later", prompt, good, GREEDY)
    tokens = harness.run()

    assert harness.finished["bad", 0].finish_reason == "error"
    assert ("bad", 0) not in tokens
    assert tokens["good", 0] == expected
    assert tokens["later", 0] == expected
    assert bool(torch.isfinite(good.values[1]).all())


def test_a_row_that_fails_leaves_the_blocks_that_it_shared_as_they_were() -> None:
    """Its own blocks are wiped. Whoever reads the shared ones goes on; newcomers compute them anew."""
    module = tiny_model("llama")
    system = _prompt(3, 48)
    sampling = SamplingParams(max_tokens=20, temperature=0.0)
    expected = generate_with_transformers(module, [*system, 5], None, 20)

    harness = Harness(module)
    harness.add("reader", [*system, 5], None, sampling)
    harness.step()
    forward = harness.runner.forward

    def failing(rows: tuple[ScheduledRow, ...]) -> torch.Tensor:
        logits = forward(rows)
        sampled = [row.sequence.request.request_id for row in rows if row.sample]
        logits[[name == "bad" for name in sampled]] = float("nan")
        return logits

    harness.runner.forward = failing  # type: ignore[method-assign] # one row's fault is injected
    harness.add("bad", [*system, 6], None, sampling)
    harness.run()
    assert harness.finished["bad", 0].finish_reason == "error"
    assert harness.finished["bad", 0].num_cached_tokens == 48
    assert harness.tokens["reader", 0] == expected

    harness.add("later", [*system, 5], None, sampling)
    assert harness.run()["later", 0] == expected
    assert harness.finished["later", 0].num_cached_tokens == 0
