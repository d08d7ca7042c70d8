"""What the prompt cache saves of the time to the first token, on the CPU. Run by hand; prints a table and JSON.

One model with random weights, and two engines over it without threads, sockets or text: one without a prompt cache,
one with. Requests share a system prompt (`--shared` tokens, 448 unless told otherwise) and go on with tokens of
their own (`--own`). Three questions, each to both engines in turn, so that both meet the same machine:

* `again`: one request, when others with its beginning were answered before;
* `first`: one request whose beginning nobody has asked for: what keys and bookkeeping cost where nothing is found;
* `burst`: `--burst` requests with one new beginning at once, until the last of them has its first token.

With one thread, the default, the clock is the processor time of that thread, which other processes disturb little; with
more it is the wall clock, and wants a quiet machine. The gain is mostly arithmetic, own tokens against all
of them: what the measurement adds is what does not shrink, and what a miss costs. Each engine has a pool as large as it wants.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics

import torch

from benchmarks.decode_step import clock, make_model
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
from server.model.loader import LoadedModel
from server.model.prepacked_linear import prepack
from server.model.runner import ModelRunner
from server.types import GenerationRequest, SamplingParams

_BLOCK_SIZE = 16
_TOKENS_PER_STEP = 512  # the server's default
_QUESTIONS = ("again", "first", "burst")


class Engine:
    """Answers prompts with one token each, stepped by hand."""

    def __init__(self, model: LoadedModel, num_blocks: int, *, cached: bool) -> None:
        blocks = BlockPool(num_blocks, _BLOCK_SIZE)
        prefixes, prompt_cache = ResidentPrefixes(blocks), PromptCache(blocks, enabled=cached)
        cache = KVCache(model.layout, num_blocks, _BLOCK_SIZE, model.device)
        self._model, self._clock, self._ids = model, clock(), itertools.count()
        self._attention = PagedAttention(make_attention_backend("auto"), cache)
        limits = SchedulerLimits(64, _TOKENS_PER_STEP)
        scheduler = Scheduler(limits, blocks, prefixes, prompt_cache)
        runner = ModelRunner(model, cache, self._attention)
        parts = EngineParts(scheduler, blocks, prefixes, prompt_cache, runner, block_bytes=1)
        self._core = EngineCore(parts, lambda _: None, self._clock)

    def seconds(self, prompts: list[tuple[int, ...]]) -> float:
        """From submission until each of the prompts has its first token."""
        self._model.connect(self._attention)
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        inbox = [
            AddRequest(GenerationRequest(str(next(self._ids)), prompt, sampling), 0, 0.0)
            for prompt in prompts
        ]
        begun, waiting = self._clock(), len(inbox)
        while waiting:
            result = self._core.step(inbox)
            inbox = []
            waiting -= len(result.outputs)
        return self._clock() - begun


class Prompts:
    """Drawn from a seed: both engines are asked the same."""

    def __init__(self, options: argparse.Namespace, vocab_size: int) -> None:
        self._options, self._vocab_size = options, vocab_size
        self._draw = random.Random(0)
        self._shared = self._tokens(options.shared)

    def ask(self, question: str) -> list[tuple[int, ...]]:
        """The prompts of one round. `again` goes on from the one beginning that stays."""
        beginning = self._shared if question == "again" else self._tokens(self._options.shared)
        count = self._options.burst if question == "burst" else 1
        return [beginning + self._tokens(self._options.own) for _ in range(count)]

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(self._vocab_size) for _ in range(count))


def measure(model: LoadedModel, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds of each question, without and with the cache."""
    length = options.shared + options.own + 1
    num_blocks = 1 + (options.burst + 4) * (options.repeats + 2) * -(-length // _BLOCK_SIZE)
    engines = {name: Engine(model, num_blocks, cached=name == "on") for name in ("off", "on")}
    prompts = Prompts(options, model.vocab_size)
    found: dict[str, dict[str, list[float]]] = {q: {n: [] for n in engines} for q in _QUESTIONS}
    for repeat in range(options.repeats + 1):
        for question in _QUESTIONS:
            asked = prompts.ask(question)
            for name, engine in engines.items():
                seconds = engine.seconds(asked)
                if repeat > 0:  # the first round fills caches, ours too
                    found[question][name].append(seconds * 1e3)
    return {q: {n: statistics.median(ms) for n, ms in found[q].items()} for q in _QUESTIONS}


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", choices=sorted(SCALES), default="0.5b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, to be quicker")
    parser.add_argument("--shared", type=int, default=448)
    parser.add_argument("--own", type=int, default=32)
    parser.add_argument("--burst", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    others = OthersMeter()
    results = measure(prepack(make_model(options)), options)
    print(f"{'':>6} {'off':>9} {'on':>9} {'off/on':>7}  (ms until the last first token)")
    for question, r in results.items():
        print(f"{question:>6} {r['off']:>9.1f} {r['on']:>9.1f} {r['off'] / r['on']:>7.2f}")
    print(
        json.dumps(vars(options) | {"others_cores": round(others.cores(), 2), "results": results})
    )


if __name__ == "__main__":
    main()
