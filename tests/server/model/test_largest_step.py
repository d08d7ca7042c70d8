"""The largest step: as large as the scheduler could ever plan one, and gone without a trace."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from server.engine.messages import MAX_TOLD_TOKENS, ScheduledRow
from server.kvcache.kv_cache import KVCache
from server.model.attention import make_attention_backend
from server.model.attention.base import PagedAttention
from server.model.device_memory import CpuMemory
from server.model.largest_step import (
    LargestStep,
    largest_plans,
    largest_step,
    run_largest_step,
)
from server.model.loader import LoadedModel, adopt_model
from server.model.prepacked_linear import prepack
from server.model.runner import ModelRunner
from tests.tiny_models import ARCHITECTURES, tiny_model

BLOCK_SIZE = 4


def runner_of(model: LoadedModel, *, num_blocks: int = 6) -> tuple[ModelRunner, KVCache]:
    cache = KVCache(model.layout, num_blocks, BLOCK_SIZE, model.device)
    attention = PagedAttention(make_attention_backend("auto", model.device), cache)
    model.connect(attention)
    return ModelRunner(model, cache, attention), cache


def peak(model: LoadedModel, step: LargestStep) -> int:
    runner, cache = runner_of(model)
    return CpuMemory().peak_of(lambda: run_largest_step(runner, cache, step))


def kv_len(row: ScheduledRow) -> int:
    return row.num_virtual_tokens + row.start + len(row.token_ids)


@pytest.mark.parametrize(
    "step",
    [
        LargestStep(512, 64, 300, 512),
        LargestStep(64, 64, 512, 512),
        LargestStep(8192, 2, 512, 512),
        LargestStep(7, 3, 1, 5),
        LargestStep(1, 1, 1, 1),
    ],
    ids=str,
)
def test_the_plans_are_as_large_as_the_limits_allow(step: LargestStep) -> None:
    for plan in largest_plans(step, 5, BLOCK_SIZE):
        room = step.max_kv_len - plan.rows[0].num_virtual_tokens
        assert len(plan.rows) <= step.num_rows
        assert plan.num_tokens <= step.num_tokens
        for row in plan.rows:
            assert row.sample
            assert row.start >= 0
            assert 1 <= len(row.token_ids) <= room
            assert kv_len(row) <= step.max_kv_len
            assert {*row.prefix_block_ids, *row.block_ids} == {5}
    mixed, prompts = largest_plans(step, 5, BLOCK_SIZE)
    assert len(mixed.rows) == step.num_rows
    assert kv_len(mixed.rows[-1]) == step.max_kv_len
    told = mixed.rows[-1].told_token_ids
    assert len(told) == min(MAX_TOLD_TOKENS // step.times, len(mixed.rows[-1].token_ids))
    most = max(mixed.num_tokens, prompts.num_tokens)
    assert most >= min(step.num_tokens, step.num_rows * room) - step.num_rows


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
def test_a_trial_leaves_nothing_behind(architecture: str) -> None:
    assert architecture in ARCHITECTURES
    model = adopt_model(tiny_model(architecture), model_id="tiny")
    runner, cache = runner_of(model)
    for layer in cache.layers:  # block 0 stays zero, the last block is the trial's
        layer.keys[BLOCK_SIZE : (cache.num_blocks - 1) * BLOCK_SIZE] = 1.5
        layer.values[BLOCK_SIZE : (cache.num_blocks - 1) * BLOCK_SIZE] = 2.5
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    state = torch.get_rng_state()

    run_largest_step(runner, cache, LargestStep(24, 4, 60, 100))

    assert torch.equal(torch.get_rng_state(), state)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_a_trial_that_fails_leaves_nothing_behind_either() -> None:
    model = adopt_model(tiny_model("llama"), model_id="tiny")
    runner, cache = runner_of(model)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    model.module.lm_head.register_forward_hook(fail)  # type: ignore[union-attr] # every layer has written then

    with pytest.raises(torch.OutOfMemoryError):
        run_largest_step(runner, cache, LargestStep(24, 4, 60, 100))

    assert not any(layer.keys.any() or layer.values.any() for layer in cache.layers)


def test_no_step_of_a_server_takes_more_than_the_largest() -> None:
    model = adopt_model(tiny_model("llama"), model_id="tiny")
    largest = LargestStep(96, 8, 200, 400)
    reserved = peak(model, largest)

    for step in (
        LargestStep(8, 8, 200, 400),  # all decode
        LargestStep(96, 1, 96, 400),  # one fresh prompt
        LargestStep(96, 8, 12, 400),
        LargestStep(50, 3, 180, 390),
    ):
        assert peak(model, step) <= reserved


@pytest.mark.parametrize("times", [2, 4, 8])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_smaller_step_as_often_is_enough_for_the_whole(architecture: str, times: int) -> None:
    model = prepack(adopt_model(tiny_model(architecture), model_id="tiny"))
    whole = LargestStep(256, 16, 200, 300)

    part = whole.made_smaller(times)

    assert (part.num_tokens, part.num_rows, part.kv_len, part.times) == (
        256 // times,
        16 // times,
        200,
        times,
    )
    assert peak(model, whole) <= times * peak(model, part) <= 4 * peak(model, whole)


def of(model: LoadedModel, **changed: int) -> LargestStep:
    limits = {
        "max_num_batched_tokens": 512, "max_num_seqs": 64, "max_model_len": 512,
        "max_num_virtual_tokens": 40, "pool_tokens": 6400,
    }  # fmt: skip
    return largest_step(model, **(limits | changed))


def test_rows_share_the_longest_prefix_and_divide_the_rest_of_the_pool() -> None:
    model = adopt_model(tiny_model("llama"), model_id="tiny")
    gpu = dataclasses.replace(model, device=torch.device("cuda"))

    assert of(gpu) == LargestStep(512, 64, 140, 512)
    assert of(gpu, pool_tokens=10**6).kv_len == 512


def test_a_cpu_runs_the_less_of_a_step_the_larger_the_model() -> None:
    tiny = adopt_model(tiny_model("llama"), model_id="tiny")
    half_billion = dataclasses.replace(tiny, weight_bytes=2 * 10**9)
    huge = dataclasses.replace(tiny, weight_bytes=10**12)

    assert of(tiny).times == 1
    assert of(half_billion).times == 32
    assert (of(huge).times, of(huge).num_tokens, of(huge).num_rows) == (64, 8, 1)
