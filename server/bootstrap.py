"""The composition root: configuration in, wired objects out. The only file that knows every class.

Runs on the main thread at start; called by `server.cli`, the trainer, benchmarks and tests. `build_engine` stops
below HTTP, for offline use; `build` adds the web application.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

import demo
from prefix_store import PrefixStore
from prefix_store.artifact import as_it_is
from prefix_store.errors import PrefixStoreError, UnknownTask
from prefix_store.spec import BaseSpec
from server import __version__
from server.config import ServeConfig
from server.engine.admission import EngineLimits
from server.engine.async_engine import AsyncEngine
from server.engine.core import EngineParts
from server.engine.intake import Intake
from server.engine.observer import EngineObserver
from server.engine.prefix_compiler import PrefixCompiler
from server.engine.proof_of_life import ProofOfLife
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.tokenizer import Tokenizer
from server.errors import ConfigError, PinRefused
from server.host_threads import compute_alone, give_helpers_back
from server.kvcache.block_pool import BlockPool
from server.kvcache.kv_cache import KVCache
from server.kvcache.memory_account import readable
from server.kvcache.pool_plan import PoolPlan
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.metrics import Metrics
from server.model.attention import make_attention_backend
from server.model.attention.base import AttentionBackend, PagedAttention
from server.model.baker import Baker
from server.model.base_spec import base_spec
from server.model.compiled_layers import compile_layers
from server.model.device import memory_or_refused, pick_device
from server.model.largest_step import LargestStep
from server.model.loader import LoadedModel, load_model
from server.model.merged_linear import merge_linears
from server.model.prefix_transfer import Staging, pack
from server.model.prepacked_linear import prepack
from server.model.prover import Prover
from server.model.recorded_steps import record_decode_steps
from server.model.runner import ModelRunner
from server.model.self_check import self_check
from server.sizing import memory_by_use, memory_of, plan_memory, try_largest_step
from server.tokenizer_source import load_tokenizer
from server.types import prefix_ref

if TYPE_CHECKING:  # the offline commands need no web framework
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

DEMO_MODEL_ID: Final = "demo"


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
    intake: Intake

    @property
    def is_demo(self) -> bool:
        """Whether this is the bundled model with its bundled tasks."""
        return self.config.model is None

    async def start(self) -> None:
        """Starts the engine thread, which has the cores; makes the pinned tasks resident, and all of the demo's few."""
        alone = ThreadPoolExecutor(thread_name_prefix="work", initializer=compute_alone)
        asyncio.get_running_loop().set_default_executor(alone)
        give_helpers_back()
        await self.engine.start()
        for task in self.config.pin:
            try:
                await self.engine.pin(prefix_ref(self.store.resolve(task)))
            except PinRefused as refused:  # a version that grew must not keep the server down
                logger.error("--pin %s: %s", task, refused)
        for info in self.store.tasks() if self.is_demo else ():
            if info.live is not None:
                self.engine.warm(prefix_ref(info.live))

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
    life: ProofOfLife


def build(config: ServeConfig) -> Application:
    """Model, store, engine, metrics and web application. Raises `PrefixdError` or `PrefixStoreError`."""
    from prefix_store.audit_log import AuditLog
    from prefix_store.key_store import KeyStore
    from server.http.app import Services, create_app
    from server.http.visible_store import VisibleStore

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
    seconds = time.monotonic() - started
    metrics.set_model_load_seconds(seconds)
    metrics.set_device_capacity(serving.pool.pool_bytes)
    metrics.set_memory(memory_by_use(serving.pool, model))
    assert config.admin_key is not None
    audit = AuditLog(config.store_dir / "audit")
    if audit.torn_bytes:
        logger.warning("cut %d bytes of a torn last line off the audit log", audit.torn_bytes)
    services = Services(
        engine=serving.engine,
        store=VisibleStore(serving.store),
        keys=KeyStore(config.store_dir / "keys"),
        intake=serving.intake,
        metrics=metrics,
        model_id=model.model_id,
        base_fingerprint=base.fingerprint,
        admin_key=config.admin_key.get_secret_value(),
        api_key=config.api_key.get_secret_value() if config.api_key else None,
        max_body_bytes=int(config.max_body_bytes),
        max_request_seconds=config.max_request_seconds,
        hang_seconds=config.hang_seconds,
        version=__version__,
        audit=audit,
    )

    life = ProofOfLife(serving.engine, repeatable=model.device.type == "cpu")

    async def start() -> None:
        await serving.start()
        await life.prove()

    async def stop() -> None:
        await serving.stop()
        audit.close()

    app = create_app(services, on_startup=start, on_shutdown=stop)
    return Application(serving, metrics, app, seconds, life)


def build_engine(config: ServeConfig, observer: EngineObserver) -> ServingEngine:
    """Loads and checks the model, opens its store, sizes the pool, wires the engine."""
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens}, expected at least max_num_seqs "
            f"({config.max_num_seqs}): each running sequence decodes one token a step"
        )
    device = pick_device(config.device)
    backend = make_attention_backend(config.attention, device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    memory = memory_of(config, device)
    source = demo.MODEL_DIR if config.model is None else Path(config.model).expanduser()
    if (
        config.model is not None
        and config.model.startswith(("/", ".", "~"))
        and not source.is_dir()
    ):
        raise ConfigError(f"--model {config.model}: there is no such folder")
    source_id: str | Path = source if source.is_dir() else str(config.model)
    model = load_model(
        source_id,
        device=device,
        dtype=_dtype(config),
        revision=config.revision,
        model_id=config.served_model_name or (DEMO_MODEL_ID if config.model is None else None),
    )
    tokenizer = load_tokenizer(config, source_id)
    base = base_spec(model, tokenizer_fingerprint=tokenizer.fingerprint())
    # After the fingerprint of its weights, before its numbers are checked.
    model = prepack(merge_linears(model))
    if config.compile:
        model = compile_layers(model)
    logger.info("self-check: relative difference %.1e", self_check(model, backend))
    plan = plan_memory(config, model, backend, memory)
    pool = plan.pool
    store = PrefixStore.open(
        config.store_dir,
        base,
        host_cache_bytes=plan.host_cache_bytes,
        # A longer prefix would leave no room for one token of a prompt and one of an answer.
        max_num_virtual_tokens=min(config.max_num_virtual_tokens, max(pool.max_model_len - 2, 1)),
        keep_as=partial(pack, pinned=True) if device.type == "cuda" else as_it_is,
    )
    if config.model is None:
        publish_demo_prefixes(store, base)
    _check_pins(config, store)
    # A CPU's pool takes no memory until it is written, so that nothing could run out now.
    again = plan.step if device.type == "cuda" else None
    return assemble_engine(config, model, backend, tokenizer, store, pool, observer, again)


def assemble_engine(
    config: ServeConfig,
    model: LoadedModel,
    backend: AttentionBackend,
    tokenizer: Tokenizer,
    store: PrefixStore,
    pool: PoolPlan,
    observer: EngineObserver,
    largest_step: LargestStep | None = None,
) -> ServingEngine:
    """The engine around what is loaded already, for `build_engine` and for evaluation while a model is trained.

    Takes the model's attention over, and with it memory for `pool`; `largest_step` is then tried beside it. Of `config`
    it reads the limits and the seed. Raises `CapacityError` for want of memory.
    """
    engine = _wire(config, model, backend, tokenizer, store, pool, observer, largest_step)
    compiler = PrefixCompiler(engine.run, Baker(model, backend), store.base, store.limits)
    intake = Intake(store, compiler, Prover(model, backend), engine.run)
    return ServingEngine(config, model, store.base, tokenizer, store, pool, engine, intake)


def _dtype(config: ServeConfig) -> str:
    """The checkpoint's own for "auto"; the demo is small, and its samples were made in float32."""
    return "float32" if config.model is None and config.dtype == "auto" else config.dtype


def _wire(
    config: ServeConfig,
    model: LoadedModel,
    backend: AttentionBackend,
    tokenizer: Tokenizer,
    store: PrefixStore,
    pool: PoolPlan,
    observer: EngineObserver,
    largest_step: LargestStep | None,
) -> AsyncEngine:
    blocks = BlockPool(pool.num_blocks, pool.block_size)
    prefixes = ResidentPrefixes(blocks)
    prompt_cache = PromptCache(blocks, enabled=config.prompt_cache)
    purpose = f"for a KV pool of {readable(pool.pool_bytes)}"
    with memory_or_refused(purpose, "lower --kv-cache-bytes or --num-kv-blocks"):
        kv_cache = KVCache(model.layout, pool.num_blocks, pool.block_size, model.device)
    attention = PagedAttention(backend, kv_cache)
    model.connect(attention)
    runner = ModelRunner(model, kv_cache, attention)
    if largest_step is not None:
        try_largest_step(runner, kv_cache, largest_step, pool.account)
    if config.cuda_graphs:
        runner.recorded = record_decode_steps(
            model,
            kv_cache,
            attention,
            backend,
            max_num_seqs=config.max_num_seqs,
            max_model_len=pool.max_model_len,
        )
    limits = SchedulerLimits(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        model.eos_token_ids,
        config.pin_budget,
    )
    parts = EngineParts(
        scheduler=Scheduler(limits, blocks, prefixes, prompt_cache),
        blocks=blocks,
        prefixes=prefixes,
        prompt_cache=prompt_cache,
        runner=runner,
        block_bytes=pool.block_bytes,
        stage=as_it_is if model.device.type == "cpu" else Staging(model.device).stage,
        # A CPU computes in the launch itself: to look for its tokens a step later would only delay them.
        overlapped=config.overlap and model.device.type == "cuda",
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
            max_num_queued_tokens=config.max_num_queued_tokens,
        ),
        observer,
        seeds=random.SystemRandom() if config.seed is None else random.Random(config.seed),  # noqa: S311 - sampling, no secret
    )


def publish_demo_prefixes(store: PrefixStore, base: BaseSpec) -> None:
    """Puts the bundled prefixes into the demo's store, each once: what a user replaced or deleted stays so.

    A new release's base model makes the old bundled prefixes useless; those are replaced.
    """
    for path in sorted(demo.PREFIXES_DIR.glob("*.safetensors")):
        if store.num_versions_ever(path.stem) == 0 or _is_outdated(store, path.stem, base):
            store.put(path.stem, path.read_bytes())


def _is_outdated(store: PrefixStore, task: str, base: BaseSpec) -> bool:
    """Whether the live version is a bundled one for another release's base model."""
    try:
        trained_on = store.resolve(task).manifest.base_model
    except UnknownTask:
        return False
    return trained_on.id == demo.BASE_MODEL_ID and trained_on.fingerprint != base.fingerprint


def _check_pins(config: ServeConfig, store: PrefixStore) -> None:
    for task in config.pin:
        try:
            store.resolve(task)
        except PrefixStoreError as error:
            raise ConfigError(f"--pin {task}: {error}") from None
