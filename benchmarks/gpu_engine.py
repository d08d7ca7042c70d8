"""Stages of `gpu.py` with a model: decode steps, whole workloads, grouping, cold prefixes, and a peer.

The engine is the server's own (`EngineCore`: scheduler, pool, runner), without its thread, its sockets and its
tokenizer. Models are made on the device with random weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from benchmarks.gpu_local_engine import BLOCK_SIZE, LocalEngine
from benchmarks.gpu_shapes import Figure, ModelShape, Sizes, nano_workload
from benchmarks.gpu_timing import clock_ms, ratio, synchronize
from benchmarks.hardware_limits import ModelCost
from prefix_store.artifact import Prefix
from prefix_store.spec import PrefixManifest
from server.engine.messages import ScheduledRow, SchedulerOutput
from server.engine.sequence import Sequence as EngineSequence
from server.kvcache.kv_cache import KVCache
from server.model.attention import make_attention_backend
from server.model.attention.base import AttentionBackend, PagedAttention, RecordableBackend
from server.model.loader import LoadedModel, adopt_model
from server.model.prefix_transfer import pack
from server.model.runner import ModelRunner
from server.types import GenerationRequest, PrefixRef, SamplingParams

if TYPE_CHECKING:  # it needs triton
    from server.model.decode_graphs import DecodeGraphs

_KV_SHARE: Final = 0.8  # of the memory that is free behind the weights


def make_model(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """A model of this shape, its weights drawn on the device."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return adopt_model(module.to(device).eval(), model_id=shape.name)


def make_prefix(model: LoadedModel, length: int, seed: int) -> Prefix:
    """Random keys and values as the store keeps them in host memory: pinned where a GPU will fetch them."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, model.layout.dtype)

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(length, heads, dim, generator=generator).to(dtype)

    layers = model.layout.layers
    prefix = Prefix(
        digest=f"sha256:{seed}-{length}",
        manifest=PrefixManifest(
            num_virtual_tokens=length, k_space="none", model_type=model.model_type
        ),
        keys=tuple(draw(x.num_kv_heads, x.key_dim) for x in layers),
        values=tuple(draw(x.num_kv_heads, x.value_dim) for x in layers),
    )
    return pack(prefix, pinned=True) if model.device.type == "cuda" else prefix


class SyntheticSteps:
    """Decode steps that no scheduler planned: every row has the same length, and decodes one token over and over."""

    def __init__(self, model: LoadedModel, backend: AttentionBackend, *, num_blocks: int) -> None:
        self._cache = KVCache(model.layout, num_blocks, BLOCK_SIZE, model.device)
        for layer in self._cache.layers:  # zeros would be told apart by no wrong read
            layer.keys.normal_()
            layer.values.normal_()
        self._model = model
        self.use(backend)

    def use(self, backend: AttentionBackend) -> None:
        """Attends with this backend from now on."""
        self._backend = backend
        self._attention = PagedAttention(backend, self._cache)
        self._model.connect(self._attention)

    @staticmethod
    def blocks_needed(num_rows: int, own_len: int, prefix_len: int, num_tasks: int) -> int:
        return 1 + num_rows * -(-own_len // BLOCK_SIZE) + num_tasks * -(-prefix_len // BLOCK_SIZE)

    def step_ms(
        self,
        num_rows: int,
        own_len: int,
        repeats: int,
        *,
        prefix_len: int = 0,
        num_tasks: int = 1,
        recorded: bool = True,
    ) -> float:
        """Milliseconds of a step, planning of tensors and sampling included; as a CUDA graph where there is CUDA."""
        free = iter(range(1, self._cache.num_blocks))
        prefixes = [
            tuple(next(free) for _ in range(-(-prefix_len // BLOCK_SIZE))) for _ in range(num_tasks)
        ]
        rows = tuple(
            _decode_row(
                own_len,
                prefixes[r % num_tasks],
                prefix_len,
                tuple(next(free) for _ in range(-(-own_len // BLOCK_SIZE))),
            )
            for r in range(num_rows)
        )
        plan = SchedulerOutput((), (), rows, 0)
        graphs = self._graphs(num_rows, prefix_len + own_len) if recorded else None
        runner = ModelRunner(self._model, self._cache, self._attention)
        runner.recorded = graphs
        return clock_ms(lambda: runner.launch(plan, {}).outcomes(), self._model.device, repeats)

    def _graphs(self, num_rows: int, kv_len: int) -> DecodeGraphs | None:
        """Of this one step."""
        if self._model.device.type != "cuda" or not isinstance(self._backend, RecordableBackend):
            return None
        from server.model.decode_graphs import CudaRecorder, DecodeGraphs

        graphs = DecodeGraphs(
            self._model,
            self._cache,
            self._attention,
            CudaRecorder(),
            max_num_rows=num_rows,
            max_model_len=kv_len,
        )
        graphs.record(min_num_rows=num_rows)
        return graphs


def _decode_row(
    own_len: int, prefix_blocks: tuple[int, ...], prefix_len: int, blocks: tuple[int, ...]
) -> ScheduledRow:
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    return ScheduledRow(
        sequence=EngineSequence(GenerationRequest("step", (7,), sampling), 0, 0, 0.0),
        token_ids=(7,),
        start=own_len - 1,
        prefix_block_ids=prefix_blocks,
        num_virtual_tokens=prefix_len,
        first_position=prefix_len,
        block_ids=blocks,
        sample=True,
    )


def decode_steps(
    shape: ModelShape, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Iterator[Figure]:
    """The engine's decode step at a context of `context_len`, and grouped against ungrouped."""
    model = make_model(shape, device, dtype)
    needs = [SyntheticSteps.blocks_needed(b, sizes.context_len, 0, 1) for b in sizes.step_batches]
    needs += [
        SyntheticSteps.blocks_needed(b, sizes.context_len, p, t) for p, b, t in sizes.grouped_cases
    ]
    backend = make_attention_backend("auto", device)
    steps = SyntheticSteps(model, backend, num_blocks=max(needs))
    cost = ModelCost.of(model.module, model.layout.bytes_per_token)
    for rows in sizes.step_batches:
        least = cost.weight_bytes + rows * sizes.context_len * cost.kv_bytes_per_token
        for recorded, how in ((False, " by launches"), (True, "")):
            ms = steps.step_ms(rows, sizes.context_len, sizes.repeats, recorded=recorded)
            note = type(backend).__name__
            yield Figure("steps", f"step{how} {shape.name} B={rows}", ms, "ms", least, note=note)
    yield from _grouped_steps(steps, shape, sizes)


def _grouped_steps(steps: SyntheticSteps, shape: ModelShape, sizes: Sizes) -> Iterator[Figure]:
    from server.model.attention.triton import TritonAttention

    backends = {grouped: TritonAttention(grouped=grouped) for grouped in (True, False)}
    for prefix_len, rows, tasks in sizes.grouped_cases:
        times = {}
        for grouped, backend in backends.items():
            steps.use(backend)
            times[grouped] = steps.step_ms(
                rows,
                sizes.context_len,
                max(2, sizes.repeats // 4),
                prefix_len=prefix_len,
                num_tasks=tasks,
            )
        name = f"{shape.name} P={prefix_len} B={rows} T={tasks}"
        gain = ratio(times[False], times[True])
        yield Figure(
            "steps", f"step grouped {name}", gain, "x", note=f"{times[True]:.2f} ms grouped"
        )


def make_request(
    name: str, prompt: Sequence[int], output_len: int, prefix: Prefix | None = None
) -> GenerationRequest:
    """Greedy, to the end."""
    sampling = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    ref = None
    if prefix is not None:
        manifest = prefix.manifest
        ref = PrefixRef(
            "task", 1, prefix.digest, manifest.num_virtual_tokens, manifest.first_position
        )
    return GenerationRequest(name, tuple(prompt), sampling, ref)


def _pool_blocks(model: LoadedModel, tokens: int) -> int:
    """As many as so many tokens need, or as there is memory for."""
    needed = 1 + -(-tokens // BLOCK_SIZE)
    if model.device.type != "cuda":
        return needed
    free, _ = torch.cuda.mem_get_info(model.device)
    return min(needed, int(free * _KV_SHARE) // (model.layout.bytes_per_token * BLOCK_SIZE))


def nano(
    shape: ModelShape, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Iterator[Figure]:
    """nano-vllm's own benchmark, through the engine: output tokens per second, as it is and with steps that do not overlap."""
    model = make_model(shape, device, dtype)
    work = nano_workload(sizes.num_nano_requests, sizes.max_nano_len)
    tokens = sum(len(w.prompt_token_ids) + w.output_len + BLOCK_SIZE for w in work)
    engine = LocalEngine(model, _pool_blocks(model, tokens))
    vocab = model.vocab_size
    requests = [
        make_request(str(i), [t % vocab for t in w.prompt_token_ids], w.output_len)
        for i, w in enumerate(work)
    ]
    engine.run([make_request("warm", (1, 2, 3), 2)])
    rates = []
    for overlapped in (True, False):
        engine.overlap(overlapped)
        seconds = engine.run(requests)
        rates.append(sum(w.output_len for w in work) / seconds)
        note = f"greedy, {len(engine.step_seconds)} steps in {seconds:.1f} s"
        name = f"nano-vllm {shape.name}" + ("" if overlapped else ", steps one after another")
        yield Figure("nano", name, rates[-1], "tokens/s", note=note)
    yield Figure("nano", f"overlap {shape.name}", ratio(*rates), "x")


def tasks_and_cold(
    shape: ModelShape, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Iterator[Figure]:
    """64 tasks against 1 at P = 32, and what a cold prefix in pinned memory adds to its request's first token."""
    model = make_model(shape, device, dtype)
    prompt, rows = list(range(1, 17)), min(64, max(sizes.step_batches))
    longest = max(*sizes.cold_prefixes, 32 * rows)
    engine = LocalEngine(model, _pool_blocks(model, longest + rows * 128 + 64 * rows))
    seconds = {}
    for tasks in (1, rows):
        prefixes = [make_prefix(model, 32, seed) for seed in range(tasks)]
        engine.prefixes.update({p.digest: p for p in prefixes})
        requests = [make_request(str(i), prompt, 48, prefixes[i % tasks]) for i in range(rows)]
        engine.run(requests)  # makes the prefixes resident, and compiles
        seconds[tasks] = min(engine.run(requests) for _ in range(2))
    gain = ratio(seconds[1], seconds[rows])
    yield Figure("tasks", f"{rows} tasks against 1, P=32", gain, "x", note=shape.name)
    for length in sizes.cold_prefixes:
        prefix = make_prefix(model, length, seed=length)
        engine.prefixes[prefix.digest] = prefix
        cold, warm = [], []
        for number in range(sizes.repeats):
            engine.evict(prefix.digest)
            engine.run([make_request(f"cold-{number}", prompt, 2, prefix)])
            cold.append(engine.first_token_seconds[f"cold-{number}"])
            engine.run([make_request(f"warm-{number}", prompt, 2, prefix)])
            warm.append(engine.first_token_seconds[f"warm-{number}"])
        added = (statistics.median(cold) - statistics.median(warm)) * 1000
        note = f"warm {statistics.median(warm) * 1000:.2f} ms"
        yield Figure("tasks", f"cold prefix adds {shape.name} P={length}", added, "ms", note=note)


def peer(
    shape: ModelShape, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Iterator[Figure]:
    """transformers' continuous batching on the same weights, prompts and lengths: output tokens per second."""
    model = make_model(shape, device, dtype)
    draw = torch.Generator().manual_seed(0)
    size = (sizes.num_peer_requests, sizes.peer_prompt_len)
    prompts = torch.randint(0, model.vocab_size, size, generator=draw).tolist()
    tokens = sizes.num_peer_requests * sizes.peer_output_len
    room = sizes.peer_prompt_len + sizes.peer_output_len + BLOCK_SIZE
    engine = LocalEngine(model, _pool_blocks(model, sizes.num_peer_requests * room))
    requests = [make_request(str(i), p, sizes.peer_output_len) for i, p in enumerate(prompts)]
    engine.run(requests)
    ours = tokens / engine.run(requests)
    yield Figure("peer", f"prefixd {shape.name}", ours, "tokens/s")
    del engine
    theirs = tokens / _transformers_seconds(model, prompts, sizes.peer_output_len)
    yield Figure("peer", f"transformers {shape.name}", theirs, "tokens/s")
    yield Figure("peer", f"vs_hf_continuous {shape.name}", ratio(ours, theirs), "x")


def _transformers_seconds(model: LoadedModel, prompts: list[list[int]], output_len: int) -> float:
    """The second of two runs; the first compiles and captures."""
    module: Any = model.module
    module.set_attn_implementation("sdpa")
    config = GenerationConfig(
        max_new_tokens=output_len, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    seconds = 0.0
    for _ in range(2):
        synchronize(model.device)
        started = time.perf_counter()
        answers = module.generate_batch(inputs=prompts, generation_config=config)
        synchronize(model.device)
        seconds = time.perf_counter() - started
        lengths = {len(answer.generated_tokens) for answer in answers.values()}
        if len(answers) != len(prompts) or lengths != {output_len}:
            raise RuntimeError(f"transformers gave {len(answers)} answers of {lengths} tokens")
    return seconds
