"""The composition root: configuration in, wired objects out. The only file that knows every class.

Runs on the main thread at start; called by `server.cli`, benchmarks and tests. `build_engine` stops below
HTTP, for offline use; `build` adds the web application.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import demo
from prefix_store import PrefixStore, PrefixVersion, UnknownTask
from prefix_store.fingerprint import base_fingerprint
from prefix_store.spec import BaseSpec
from server import __version__
from server.config import ServeConfig
from server.engine.async_engine import AsyncEngine, EngineLimits, EngineObserver
from server.engine.core import EngineParts
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.tokenizer import Tokenizer
from server.errors import ConfigError
from server.kvcache.block_pool import BlockPool
from server.kvcache.kv_cache import KVCache
from server.kvcache.pool_plan import PoolPlan, plan_pool
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.metrics import Metrics
from server.model.attention import make_attention_backend
from server.model.attention.base import AttentionBackend, PagedAttention
from server.model.device import available_bytes, pick_device
from server.model.loader import LoadedModel, load_model
from server.model.runner import ModelRunner
from server.model.self_check import self_check
from server.types import PrefixRef

if TYPE_CHECKING:  # the offline commands need no web framework
    from fastapi import FastAPI

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServingEngine:
    """Everything below HTTP, ready to start."""

    config: ServeConfig
    model: LoadedModel
    base: BaseSpec
    tokenizer: Tokenizer
    store: PrefixStore
    pool: PoolPlan
    engine: AsyncEngine

    async def start(self) -> None:
        """Starts the engine thread and makes the pinned tasks resident."""
        await self.engine.start()
        for task in self.config.pin:
            self.engine.warm(prefix_ref(self.store.resolve(task)), pin=True)

    async def stop(self) -> None:
        """Stops the engine, then gives the store up."""
        await self.engine.stop()
        self.store.close()


@dataclass(frozen=True, slots=True)
class Application:
    """A server ready to be run by uvicorn; `app` starts and stops the engine with its lifespan."""

    serving: ServingEngine
    metrics: Metrics
    app: FastAPI
    start_seconds: float

    def summary(self, url: str) -> str:
        """What a person wants to read once the server is up; `url` is where it listens."""
        return start_up_summary(self.serving, url, self.start_seconds)


def prefix_ref(version: PrefixVersion) -> PrefixRef:
    """What the engine needs of a stored version."""
    return PrefixRef(
        task=version.task,
        version=version.version,
        digest=version.digest,
        num_virtual_tokens=version.manifest.num_virtual_tokens,
        first_position=version.manifest.first_position,
    )


def build(config: ServeConfig) -> Application:
    """Model, store, engine, metrics and web application. Raises `PrefixdError` or `PrefixStoreError`."""
    from server.http.app import Services, create_app

    started = time.monotonic()
    config = config.with_generated_admin_key()
    metrics = Metrics(max_tasks=config.metrics_max_tasks)
    serving = build_engine(config, metrics)
    model, base = serving.model, serving.base
    metrics.set_build_info(
        version=__version__,
        torch=str(torch.__version__),
        cuda=str(torch.version.cuda),
        model=model.model_id,
        revision=config.revision or "",
        dtype=model.layout.dtype,
    )
    assert config.admin_key is not None
    services = Services(
        engine=serving.engine,
        store=serving.store,
        metrics=metrics,
        model_id=model.model_id,
        base_fingerprint=base.fingerprint,
        admin_key=config.admin_key.get_secret_value(),
        api_key=config.api_key.get_secret_value() if config.api_key else None,
        max_body_bytes=int(config.max_body_bytes),
        version=__version__,
    )
    app = create_app(services, on_startup=serving.start, on_shutdown=serving.stop)
    return Application(serving, metrics, app, time.monotonic() - started)


def build_engine(config: ServeConfig, observer: EngineObserver) -> ServingEngine:
    """Loads and checks the model, opens its store, sizes the pool, wires the engine."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    source = demo.MODEL_DIR if config.model is None else Path(config.model).expanduser()
    source_id: str | Path = source if source.is_dir() else str(config.model)
    model = load_model(
        source_id,
        revision=config.revision,
        dtype=config.dtype,
        device=pick_device(config.device),
    )
    backend = make_attention_backend(config.attention)
    logger.info("self-check: relative difference %.1e", self_check(model, backend))
    tokenizer = Tokenizer.load(source_id, revision=config.revision)
    base = _base_spec(model)
    pool = _plan_pool(config, model)
    store = PrefixStore.open(
        config.store_dir,
        base,
        host_cache_bytes=int(config.host_cache_bytes),
        max_num_virtual_tokens=config.max_num_virtual_tokens,
    )
    if config.model is None:
        publish_demo_prefixes(store, base)
    engine = _wire(config, model, backend, tokenizer, store, pool, observer)
    return ServingEngine(config, model, base, tokenizer, store, pool, engine)


def _base_spec(model: LoadedModel) -> BaseSpec:
    return BaseSpec(
        model_id=model.model_id,
        model_type=model.model_type,
        layout=model.layout,
        position_limit=model.position_limit,
        position_scheme=model.position_scheme,
        rope_theta=model.rope_theta,
        vocab_size=model.vocab_size,
        fingerprint=base_fingerprint(model.module),
    )


def _plan_pool(config: ServeConfig, model: LoadedModel) -> PoolPlan:
    budget = config.kv_cache_bytes
    return plan_pool(
        model.layout,
        block_size=config.block_size,
        budget_bytes=available_bytes(model.device) if budget is None else int(budget),
        num_blocks=config.num_kv_blocks,
        max_model_len=config.max_model_len,
        position_limit=model.position_limit,
        max_num_seqs=config.max_num_seqs,
    )


def _wire(
    config: ServeConfig,
    model: LoadedModel,
    backend: AttentionBackend,
    tokenizer: Tokenizer,
    store: PrefixStore,
    pool: PoolPlan,
    observer: EngineObserver,
) -> AsyncEngine:
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens}, expected at least max_num_seqs "
            f"({config.max_num_seqs}): each running sequence decodes one token a step"
        )
    blocks = BlockPool(pool.num_blocks, pool.block_size)
    prefixes = ResidentPrefixes(blocks)
    kv_cache = KVCache(model.layout, pool.num_blocks, pool.block_size, model.device)
    attention = PagedAttention(backend, kv_cache)
    model.connect(attention)
    limits = SchedulerLimits(
        config.max_num_seqs, config.max_num_batched_tokens, model.eos_token_ids
    )
    parts = EngineParts(
        scheduler=Scheduler(limits, blocks, prefixes),
        blocks=blocks,
        prefixes=prefixes,
        runner=ModelRunner(model, kv_cache, attention),
        block_bytes=pool.block_bytes,
    )
    return AsyncEngine(
        parts,
        tokenizer,
        store,
        EngineLimits(
            max_model_len=pool.max_model_len,
            position_limit=model.position_limit,
            pool_blocks=pool.usable_blocks,
            block_size=pool.block_size,
            vocab_size=model.vocab_size,
            max_num_queued=config.max_num_queued,
        ),
        observer,
        seeds=random.SystemRandom() if config.seed is None else random.Random(config.seed),  # noqa: S311
    )


def publish_demo_prefixes(store: PrefixStore, base: BaseSpec) -> None:
    """Puts the bundled prefixes into the demo's store; leaves a task alone that the user has replaced."""
    for path in sorted(demo.PREFIXES_DIR.glob("*.safetensors")):
        try:
            live = store.resolve(path.stem)
            if live.manifest.base_model.fingerprint == base.fingerprint:
                continue
        except UnknownTask:
            pass
        store.put(path.stem, path.read_bytes())


def start_up_summary(serving: ServingEngine, url: str, start_seconds: float) -> str:
    """The banner: what is served, what fits, where to look, the first request to try."""
    model, pool, config = serving.model, serving.pool, serving.config
    tasks = serving.store.tasks()
    task = tasks[0].name if tasks else model.model_id
    rows = [
        ("model", f"{model.model_id} ({model.model_type}, {model.weight_bytes / 2**20:.1f} MiB)"),
        ("device", f"{model.device}, {model.layout.dtype}"),
        (
            "KV pool",
            f"{pool.usable_blocks} blocks of {pool.block_size} tokens, {pool.pool_bytes / 2**20:.0f} MiB "
            f"-> fits {pool.num_full_requests()} requests of {pool.max_model_len} tokens",
        ),
        ("tasks", _describe_tasks([t.live for t in tasks], serving)),
        ("API", f"{url}/v1/completions  {url}/generate  {url}/docs"),
        ("metrics", f"{url}/metrics   health: {url}/healthz {url}/readyz"),
        ("store", str(config.store_dir)),
        ("ready in", f"{start_seconds:.1f} s"),
    ]
    if config.origins.get("admin_key") == "generated at start" and config.admin_key:
        rows.append(("admin key", f"{config.admin_key.get_secret_value()}  (made for this run)"))
    width = max(len(name) for name, _ in rows)
    lines = [f"prefixd {__version__}", *(f"  {name:<{width}}  {text}" for name, text in rows)]
    return "\n".join([*lines, "", "Try:", f"  {first_request(url, task)}"])


def _describe_tasks(live: Sequence[PrefixVersion], serving: ServingEngine) -> str:
    """How many, which, and how many of them could be resident at once."""
    if not live:
        return "none yet: prefixd tasks push FILE --task NAME"
    foreign = sum(
        v.manifest.base_model.fingerprint not in (None, serving.base.fingerprint) for v in live
    )
    pool = serving.pool
    blocks = [-(-v.manifest.num_virtual_tokens // pool.block_size) for v in live]
    fits = pool.usable_blocks * len(blocks) // sum(blocks)
    names = ", ".join(v.task for v in live[:6]) + (", ..." if len(live) > 6 else "")
    warning = f"; {foreign} made for another base" if foreign else ""
    return f"{len(live)} ({names}){warning}; the pool holds about {fits} prefixes of their size"


def first_request(url: str, task: str) -> str:
    """A `curl` command that works as it stands."""
    samples = {sample.task: sample.prompt for sample in demo.load_samples()}
    prompt = samples.get(task, "Hello").replace("'", "'\\''").replace("\n", "\\n")
    body = f'{{"model": "{task}", "prompt": "{prompt}", "max_tokens": 48, "temperature": 0}}'
    return f"curl --json '{body}' {url}/v1/completions"
