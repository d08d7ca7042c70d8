"""How memory is divided at start, and what is said when it can not be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import demo
from server import sizing
from server.bootstrap import build_engine
from server.config import ServeConfig
from server.errors import CapacityError, ConfigError
from server.kvcache.kv_cache import KVCache
from server.kvcache.memory_account import MemoryAccount
from server.metrics import Metrics
from server.model.attention import make_attention_backend
from server.model.attention.base import PagedAttention
from server.model.device_memory import CpuMemory
from server.model.host_memory import HostMemory
from server.model.largest_step import LargestStep
from server.model.loader import LoadedModel, load_model
from server.model.runner import ModelRunner
from server.sizing import MemoryPlan, memory_by_use, memory_of, plan_memory, try_largest_step

GB = 10**9
MB = 10**6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(demo.MODEL_DIR, device=CPU, dtype="float32")


def plan(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, free: int, **settings: Any
) -> MemoryPlan:
    """Of a host with so many bytes free."""
    monkeypatch.setattr(sizing, "host_memory", lambda: HostMemory(64 * GB, free))
    backend = make_attention_backend("sdpa", CPU)
    config = ServeConfig(device="cpu", **settings)
    return plan_memory(config, model, backend, CpuMemory(lambda: HostMemory(64 * GB, free)))


def account_of(planned: MemoryPlan) -> MemoryAccount:
    assert planned.pool.account is not None
    return planned.pool.account


@pytest.mark.parametrize("free", [300 * MB, 1 * GB, 4 * GB, 40 * GB])
def test_pool_and_host_cache_and_steps_fit_into_what_is_free(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    planned = plan(model, monkeypatch, free)
    account = account_of(planned)

    assert planned.pool.pool_bytes + account.used_bytes <= account.budget_bytes < free
    assert planned.host_cache_bytes == min(2**30, free // 4)
    assert {use.name for use in account.uses} == {"largest step", "host cache", "uploads on trial"}
    assert all(use.num_bytes > 0 for use in account.uses)


def test_a_host_cache_of_a_stated_size_is_taken_from_the_pool_s_share(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(model, monkeypatch, 1 * GB, host_cache_bytes=350 * MB)

    assert planned.host_cache_bytes == 350 * MB
    assert planned.pool.pool_bytes < 150 * MB


def test_when_nothing_is_left_every_term_is_named(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CapacityError) as refused:
        plan(model, monkeypatch, 1 * GB, host_cache_bytes=480 * MB)

    message = str(refused.value)
    for part in (
        "free memory, weights loaded 1.0 GB x 0.5", "largest step", "host cache 480.0 MB", "uploads on trial",
        "lower --host-cache-bytes", "--max-num-batched-tokens or --max-num-seqs",
    ):  # fmt: skip
        assert part in message


def test_a_host_cache_larger_than_what_is_free_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CapacityError, match=r"--host-cache-bytes is 2\.0 GB, but 1\.0 GB"):
        plan(model, monkeypatch, 1 * GB, host_cache_bytes=2 * GB, kv_cache_bytes=MB)


def test_a_stated_pool_may_take_more_than_the_share_but_not_more_than_there_is(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert plan(model, monkeypatch, 1 * GB, num_kv_blocks=8_000).pool.num_blocks == 8_000
    assert caplog.records == []

    with caplog.at_level(logging.WARNING):
        plan(model, monkeypatch, 1 * GB, num_kv_blocks=12_000)
    assert "may not leave room for all the rest" in caplog.text

    with pytest.raises(CapacityError, match="take more than there is"):
        plan(model, monkeypatch, 1 * GB, num_kv_blocks=14_000)


def test_a_larger_step_leaves_a_smaller_pool(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (
        plan(model, monkeypatch, 1200 * MB, max_num_batched_tokens=tokens, max_num_seqs=64)
        for tokens in (64, 2048)
    )

    assert large.pool.num_blocks < small.pool.num_blocks
    assert account_of(large).uses[0].num_bytes > account_of(small).uses[0].num_bytes


def test_a_share_of_a_gpu_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"--gpu-memory-utilization .*--kv-cache-bytes"):
        memory_of(ServeConfig(gpu_memory_utilization=0.9), CPU)
    assert isinstance(memory_of(ServeConfig(), CPU), CpuMemory)


def test_out_of_memory_beside_the_pool_is_refused_with_the_settings_to_lower(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = KVCache(model.layout, 3, 16, CPU)
    attention = PagedAttention(make_attention_backend("sdpa", CPU), cache)
    runner = ModelRunner(model, cache, attention)
    model.connect(attention)
    step = LargestStep(32, 4, 100, 200)
    try_largest_step(runner, cache, step, None)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LoadedModel, "logits", fail)
    with pytest.raises(CapacityError, match=r"largest step beside the KV pool: lower --max-num"):
        try_largest_step(runner, cache, step, None)


def test_what_is_no_lack_of_memory_is_not_called_so(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(LoadedModel, "logits", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        plan(model, monkeypatch, 1 * GB)


def test_a_server_with_too_little_memory_for_one_request_does_not_start(tmp_path: Path) -> None:
    config = ServeConfig(store=tmp_path, device="cpu", kv_cache_bytes=100_000)

    with pytest.raises(CapacityError, match="raise kv_cache_bytes or num_kv_blocks"):
        build_engine(config, Metrics())


def test_a_server_starts_with_a_clean_pool_and_figures_for_its_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[KVCache] = []
    made = KVCache.__init__

    def note(self: KVCache, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        pools.append(self)

    monkeypatch.setattr(KVCache, "__init__", note)
    serving = build_engine(
        ServeConfig(store=tmp_path, device="cpu", num_kv_blocks=65), metrics := Metrics()
    )

    assert pools[-1].num_blocks == 65
    assert not any(layer.keys.any() or layer.values.any() for layer in pools[-1].layers)
    metrics.set_memory(memory_by_use(serving.pool, serving.model))
    sample = metrics.registry.get_sample_value
    shown = {
        use: sample("prefixd_memory_bytes", {"use": use})
        for use in ("weights", "largest_step", "host_cache", "uploads_on_trial", "kv_pool")
    }
    assert shown["weights"] == serving.model.weight_bytes
    assert shown["kv_pool"] == serving.pool.pool_bytes
    assert all(shown.values())
    assert sample("prefixd_batch_tokens_count") == 0, "no metric saw the trial"
