"""Where a decode step's time goes on the CPU, and what changes it. Run by hand; prints a table and JSON.

Engines without threads, sockets or text, over the same random weights, each with one change more: linear layers as
they are (`plain`), `prepacked`, prepacked and `merged` as the server has them, and with `compiled` decoder layers
(`--variants` chooses; ratios are to the first). B requests with contexts of equal length decode; the engines take turns, step by
step, so that both meet the same machine. `outside` is what a step spends before and after the model runs:
scheduling, building tensors, sampling, committing. Resident prefixes that nobody reads may be added
(`--resident`): a step must not get longer by them.

With one thread, the default, the clock is the processor time of that thread, which other processes disturb
little (their caches, their share of the memory's bandwidth); with more it is the wall clock, and wants a quiet
machine. Unfair to nobody: there is no peer here. At 24 layers each model takes 1.3 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine_load import OthersMeter
from benchmarks.workload import SCALES
from server.engine.core import EngineCore, EngineParts
from server.engine.messages import AddRequest
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.kvcache.block_pool import BlockPool
from server.kvcache.kv_cache import KVCache
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.model.attention import make_attention_backend
from server.model.attention.base import PagedAttention
from server.model.compiled_layers import compile_layers
from server.model.loader import LoadedModel, adopt_model
from server.model.merged_linear import merge_linears
from server.model.prepacked_linear import prepack
from server.model.runner import ModelRunner
from server.types import GenerationRequest, PrefixRef, SamplingParams

_BLOCK_SIZE = 16
_WARM_STEPS = 3  # the prefill, and two to fill caches

VARIANTS: dict[str, Callable[[LoadedModel], LoadedModel]] = {
    "plain": lambda model: model,
    "prepacked": prepack,
    "merged": lambda model: prepack(merge_linears(model)),
    "compiled": lambda model: compile_layers(prepack(merge_linears(model))),
}


class Engine:
    """`num_requests` sequences that decode, stepped by hand."""

    def __init__(self, model: LoadedModel, options: argparse.Namespace, num_requests: int) -> None:
        length = options.context + options.steps + _WARM_STEPS + 1
        num_blocks = 1 + options.resident + num_requests * -(-length // _BLOCK_SIZE)
        blocks = BlockPool(num_blocks, _BLOCK_SIZE)
        prefixes = ResidentPrefixes(blocks)
        for i in range(options.resident):
            prefixes.reserve(PrefixRef(f"task-{i}", 1, f"sha256:{i}", _BLOCK_SIZE, _BLOCK_SIZE))
        cache = KVCache(model.layout, num_blocks, _BLOCK_SIZE, model.device)
        self._model, self._clock = model, clock()
        self._attention = PagedAttention(make_attention_backend("auto"), cache)
        prompt_cache = PromptCache(blocks, enabled=False)  # as many keys to read as rows
        parts = EngineParts(
            Scheduler(SchedulerLimits(num_requests, 2**20), blocks, prefixes, prompt_cache),
            blocks,
            prefixes,
            prompt_cache,
            ModelRunner(model, cache, self._attention),
            block_bytes=1,
        )
        self._core = EngineCore(parts, lambda _: None, self._clock)
        sampling = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        prompt = tuple(range(1, options.context + 1))
        self._inbox = [
            AddRequest(GenerationRequest(str(i), prompt, sampling), 0, 0.0)
            for i in range(num_requests)
        ]
        for _ in range(_WARM_STEPS):
            self.step()

    def step(self) -> tuple[float, float]:
        """Milliseconds of one step, and of it outside the model."""
        inbox, self._inbox = self._inbox, []
        self._model.connect(self._attention)
        inside: list[float] = []
        module = self._model.module
        hooks = [
            module.register_forward_pre_hook(lambda *_: inside.append(-self._clock())),
            module.register_forward_hook(lambda *_: inside.append(self._clock())),
        ]
        begun = self._clock()
        self._core.step(inbox)
        seconds = self._clock() - begun
        for hook in hooks:
            hook.remove()
        return seconds * 1e3, (seconds - sum(inside)) * 1e3


def clock() -> Callable[[], float]:
    """Seconds: of this thread's own work if it works alone, else of the wall."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def make_model(options: argparse.Namespace) -> LoadedModel:
    """Random weights, the same ones at each call."""
    config = AutoConfig.for_model("qwen2", **SCALES[options.scale].config)
    if options.layers is not None:
        config.num_hidden_layers = options.layers
        config.layer_types = config.layer_types[: options.layers]
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    return adopt_model(module, model_id=options.scale)


def measure(
    models: dict[str, LoadedModel], options: argparse.Namespace, num_requests: int
) -> dict[str, float]:
    """Median milliseconds of a step, and of it outside the model, for each engine."""
    engines = {name: Engine(model, options, num_requests) for name, model in models.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(options.steps):
        for name, engine in engines.items():
            found[name].append(engine.step())
    medians = {}
    for name, steps in found.items():
        medians[f"{name}_ms"] = statistics.median(step for step, _ in steps)
        medians[f"{name}_outside_ms"] = statistics.median(outside for _, outside in steps)
    return medians


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", choices=sorted(SCALES), default="0.5b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, to be quicker")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--resident", type=int, default=0, help="resident prefixes that nobody reads"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--variants", choices=list(VARIANTS), nargs="+", default=["plain", "prepacked", "merged"]
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    others = OthersMeter()
    models = {name: VARIANTS[name](make_model(options)) for name in options.variants}
    first = options.variants[0]
    print("  B" + "".join(f" {name + ' ms':>13} ratio outside" for name in models))
    results = {}
    for batch in options.batches:
        r = results[batch] = measure(models, options, batch)
        print(
            f"{batch:>3}"
            + "".join(
                f" {r[f'{n}_ms']:>13.2f} {r[f'{first}_ms'] / r[f'{n}_ms']:>5.3f} {r[f'{n}_outside_ms']:>7.2f}"
                for n in models
            ),
            flush=True,
        )
    print(
        json.dumps(vars(options) | {"others_cores": round(others.cores(), 2), "results": results})
    )


if __name__ == "__main__":
    main()
