"""How memory is divided at start: what the largest step, uploads and the host cache need, and the KV pool after them.

Runs on the main thread, once, with the weights loaded and the engine not yet built; called by `server.bootstrap`. The
arithmetic is `MemoryAccount` and `plan_pool`, what is measured is `DeviceMemory`'s and `host_memory`'s.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import torch

from server.config import ServeConfig
from server.engine.intake import MAX_PROVING
from server.errors import CapacityError, ConfigError
from server.kvcache.kv_cache import KVCache
from server.kvcache.memory_account import MemoryAccount, MemoryUse, readable
from server.kvcache.pool_plan import PoolPlan, plan_pool
from server.model.attention.base import AttentionBackend, PagedAttention
from server.model.device import memory_or_refused
from server.model.device_memory import UTILIZATION, CpuMemory, CudaMemory, DeviceMemory
from server.model.host_memory import host_memory
from server.model.largest_step import LargestStep, largest_step, run_largest_step
from server.model.loader import LoadedModel
from server.model.prefix_transfer import STAGING_BYTES
from server.model.recorded_steps import can_record, recorded_bytes
from server.model.runner import ModelRunner

logger = logging.getLogger(__name__)

LARGEST_STEP: Final = "largest step"
STEP_SETTINGS: Final = "--max-num-batched-tokens or --max-num-seqs"
# Of the free host memory, for a host cache that nobody gave a size.
_HOST_CACHE_SHARE: Final = 0.25
# An artifact on trial in host memory: its bytes, its tensors in the serving dtype, and on a CPU the trial's KV cache.
_COPIES_ON_A_CPU: Final = 3


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Who gets what. `step` is what `pool.account` sets memory aside for."""

    pool: PoolPlan
    step: LargestStep
    host_cache_bytes: int


def memory_of(config: ServeConfig, device: torch.device) -> DeviceMemory:
    """Before the model is loaded. Raises `ConfigError` for a share of a GPU where there is none, `CapacityError`."""
    if device.type == "cuda":
        return CudaMemory(device, config.gpu_memory_utilization)
    if "gpu_memory_utilization" in config.origins:
        raise ConfigError(
            f"{UTILIZATION} is a share of a GPU's memory, and the model is on the {device.type}: "
            "leave it out, and say with --kv-cache-bytes what the KV pool may take"
        )
    return CpuMemory()


def plan_memory(
    config: ServeConfig, model: LoadedModel, backend: AttentionBackend, memory: DeviceMemory
) -> MemoryPlan:
    """Runs the largest step and sizes the pool behind it. Takes the model's attention over.

    Raises `CapacityError` with every term when not one request would fit.
    """
    host_cache_bytes = _host_cache_bytes(config)
    others = _other_uses(config, model, backend, host_cache_bytes)
    first = plan_for(config, model, memory.account(others))
    step = largest_step(
        model,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=first.max_model_len,
        max_num_virtual_tokens=_longest_prefix(config, model),
        pool_tokens=first.num_tokens,
    )
    num_bytes = step.times * _measured(config, model, backend, memory, step)
    account = memory.account((MemoryUse(LARGEST_STEP, num_bytes, STEP_SETTINGS), *others))
    pool = plan_for(config, model, account)
    _check_stated_pool(pool, num_bytes)
    logger.info("memory: %s; the KV pool takes %s", account, readable(pool.pool_bytes))
    return MemoryPlan(pool, step, host_cache_bytes)


def plan_for(
    config: ServeConfig, model: LoadedModel, account: MemoryAccount | None = None
) -> PoolPlan:
    """The KV pool that `config` asks for, or what `account` leaves. Raises `CapacityError`."""
    stated = config.kv_cache_bytes
    return plan_pool(
        model.layout,
        block_size=config.block_size,
        kv_cache_bytes=None if stated is None else int(stated),
        num_blocks=config.num_kv_blocks,
        max_model_len=config.max_model_len,
        position_limit=model.position_limit,
        max_num_seqs=config.max_num_seqs,
        account=account,
    )


def memory_by_use(pool: PoolPlan, model: LoadedModel) -> dict[str, int]:
    """For the metrics: the account's lines under names fit for labels, the weights on a CPU too, and the pool."""
    uses = () if pool.account is None else pool.account.uses
    named = {use.name.replace(" ", "_"): use.num_bytes for use in uses}
    return {"weights": model.weight_bytes, **named, "kv_pool": pool.pool_bytes}


def try_largest_step(
    runner: ModelRunner, kv_cache: KVCache, step: LargestStep, account: MemoryAccount | None
) -> None:
    """The step that memory was set aside for, beside the real pool. Raises `CapacityError`: better now than later."""
    found = "" if account is None else f" ({account})"
    remedy = f"lower {STEP_SETTINGS}, or --kv-cache-bytes or {UTILIZATION}{found}"
    with memory_or_refused("for the largest step beside the KV pool", remedy):
        run_largest_step(runner, kv_cache, step)


def _measured(
    config: ServeConfig,
    model: LoadedModel,
    backend: AttentionBackend,
    memory: DeviceMemory,
    step: LargestStep,
) -> int:
    """Bytes of one run over two blocks: the pool is not there yet."""
    kv_cache = KVCache(model.layout, 2, config.block_size, model.device)
    attention = PagedAttention(backend, kv_cache)
    runner = ModelRunner(model, kv_cache, attention)
    purpose = f"for a step of {step.num_tokens} tokens in {step.num_rows} rows"
    with model.connected(attention), memory_or_refused(purpose, f"lower {STEP_SETTINGS}"):
        return memory.peak_of(lambda: run_largest_step(runner, kv_cache, step))


def _longest_prefix(config: ServeConfig, model: LoadedModel) -> int:
    """Virtual tokens of the longest prefix that can be served."""
    limit = config.max_model_len or model.position_limit
    most = config.max_num_virtual_tokens
    return most if limit is None else min(most, max(1, limit - 2))


def _other_uses(
    config: ServeConfig, model: LoadedModel, backend: AttentionBackend, host_cache_bytes: int
) -> tuple[MemoryUse, ...]:
    """What is taken later, at the most: on the device, which on a CPU is the host."""
    on_cpu = model.device.type == "cpu"
    longest = _longest_prefix(config, model) * model.layout.bytes_per_token
    copies = MAX_PROVING * (_COPIES_ON_A_CPU if on_cpu else 1)
    uploads = MemoryUse("uploads on trial", copies * longest, "--max-num-virtual-tokens")
    if not on_cpu:
        recorded = config.cuda_graphs and can_record(model, backend)
        graphs = recorded_bytes(model, config.max_num_seqs) if recorded else 0
        return (
            uploads,
            MemoryUse("prefixes on their way", STAGING_BYTES),
            MemoryUse("CUDA graphs", graphs, "--max-num-seqs, or --no-cuda-graphs"),
        )
    return (MemoryUse("host cache", host_cache_bytes, "--host-cache-bytes"), uploads)


def _host_cache_bytes(config: ServeConfig) -> int:
    """As stated, else the default, or a quarter of what is free where that is less. Raises `CapacityError`."""
    free = host_memory().available_bytes
    asked = int(config.host_cache_bytes)
    if "host_cache_bytes" not in config.origins:
        return min(asked, int(free * _HOST_CACHE_SHARE))
    if asked > free:
        raise CapacityError(
            f"--host-cache-bytes is {readable(asked)}, but {readable(free)} of host memory are free: lower it"
        )
    return asked


def _check_stated_pool(pool: PoolPlan, step_bytes: int) -> None:
    """A pool of a stated size may take more than the share, but not more than there is. Raises `CapacityError`."""
    account = pool.account
    assert account is not None
    if pool.pool_bytes + step_bytes > account.total_bytes:
        raise CapacityError(
            f"a KV pool of {readable(pool.pool_bytes)} and the largest step, {readable(step_bytes)}, take more "
            f"than there is ({account.source}: {readable(account.total_bytes)}): lower --kv-cache-bytes or "
            f"--num-kv-blocks, or {STEP_SETTINGS}"
        )
    if pool.pool_bytes + account.used_bytes > account.total_bytes:
        logger.warning(
            "a KV pool of %s may not leave room for all the rest: %s",
            readable(pool.pool_bytes),
            account,
        )
