"""A program that behaves like `benchmarks/vllm_worker.py` with a vLLM that gives each prompt's last token and its successors.

Started by the driver in a process of its own; imports nothing heavy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from benchmarks.vllm_worker import OfflineEngine
from benchmarks.worker_protocol import Message, Serve, work


@dataclass
class FakeEngine:
    """vLLM's engine, as far as the worker uses it. Prompts are computed one a step, then all decode."""

    waiting: list[tuple[str, list[int], int]] = field(default_factory=list)
    running: dict[str, list[Any]] = field(default_factory=dict)
    seen: list[list[int]] = field(default_factory=list)

    def add_request(self, name: str, prompt: Mapping[str, list[int]], output_len: int) -> None:
        self.waiting.append((name, prompt["prompt_token_ids"], output_len))
        self.seen.append(prompt["prompt_token_ids"])

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Any]:
        """Cumulative outputs of all that runs, as vLLM's are."""
        time.sleep(0.005)  # at no time at all, ratios would be rounded to nought
        if self.waiting:
            name, prompt, output_len = self.waiting.pop(0)
            self.running[name] = [prompt[-1], [], output_len]
        outputs = []
        for name, (last, tokens, output_len) in list(self.running.items()):
            tokens.append(last + 1 + len(tokens))
            outputs.append(
                SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tuple(tokens))])
            )
            if len(tokens) == output_len:
                del self.running[name]
        return outputs


@dataclass
class FakeLlm:
    llm_engine: FakeEngine = field(default_factory=FakeEngine)
    num_resets: int = 0

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1


def prepare(setup: Message) -> tuple[Serve, Mapping[str, Any]]:
    print("libraries print what they like")
    engine = OfflineEngine(
        FakeLlm(), lambda n: n, lambda ids: {"prompt_token_ids": ids}, setup["texts"]
    )
    return engine.serve, {"vllm": "none"}


if __name__ == "__main__":
    work(prepare)
