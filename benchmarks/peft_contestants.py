"""Hugging Face PEFT as a contestant: prefix tuning, served with `generate`.

PEFT holds one active adapter, so requests of two tasks never share a step. Two ways are left: one request
at a time in order of arrival, and the requests of one task together. Both run on one PEFT model that holds
all tasks' adapters in memory, built from the very K/V tensors that prefixd gets as artifacts.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.contest import Call
from benchmarks.workload import Request, TaskPrefix

Attention = Literal["sdpa", "eager"]


def load_peft_model(
    model_dir: Path, prefixes: Sequence[TaskPrefix], *, attention: Attention
) -> PeftModel:
    """The model in its own dtype, with one prefix-tuning adapter per task."""
    base = AutoModelForCausalLM.from_pretrained(
        str(model_dir), dtype="auto", attn_implementation=attention
    ).eval()
    first, *others = prefixes
    with warnings.catch_warnings():
        # PEFT asks whether gradients are checkpointed, by a name that transformers is about to drop.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)
        model = get_peft_model(base, _config(first), adapter_name=first.task)
        for prefix in others:
            model.add_adapter(prefix.task, _config(prefix))
    for prefix in prefixes:
        model.prompt_encoder[prefix.task].load_prompt_embeddings(prompt_embeddings(prefix))
    return model.eval()


def _config(prefix: TaskPrefix) -> PrefixTuningConfig:
    num_virtual_tokens, heads, head_dim = prefix.keys[0].shape
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        num_virtual_tokens=num_virtual_tokens,
        num_layers=len(prefix.keys),
        num_attention_heads=heads,
        token_dim=heads * head_dim,
    )


def prompt_embeddings(prefix: TaskPrefix) -> Tensor:
    """PEFT's one matrix [P, 2 * layers * H * D]: layer 0 K, layer 0 V, layer 1 K, ... of each token."""
    pairs = zip(prefix.keys, prefix.values, strict=True)
    return torch.stack([t for pair in pairs for t in pair], dim=1).flatten(1).float()


class PeftGenerate:
    """Calls of one shape through a PEFT model; `group` is how many requests of a task go together."""

    def __init__(self, model: PeftModel, name: str, description: str, group: int) -> None:
        self._model = model
        self.name: Final = name
        self.description: Final = description
        self._group = group

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """A call leaves when its first request arrived, filled up with later ones of the same task."""
        calls: list[list[Request]] = []
        filling: dict[str, list[Request]] = {}
        for request in requests:
            call = filling.get(request.task)
            if call is None or len(call) == self._group:
                call = filling[request.task] = []
                calls.append(call)
            call.append(request)
        return [tuple(call) for call in calls]

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        """Switches to the task's adapter and generates."""
        self._model.set_adapter(requests[0].task)
        return generate(self._model, requests, output_len)

    def close(self) -> None:
        """Nothing runs between calls."""


def generate(model: Any, requests: tuple[Request, ...], output_len: int, **further: Any) -> Call:
    """One `generate` over prompts of one length, greedy, timed token by token. `further`: what else it is given."""
    clock = _TokenClock()
    started = time.perf_counter()
    prompts = torch.tensor([request.prompt_token_ids for request in requests])
    output: Any = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=output_len,
        do_sample=False,
        streamer=clock,
        **further,
    )
    seconds = time.perf_counter() - started
    # The streamer is told of the prompt first, then of every token.
    first, *later = clock.times[1:]
    gaps = [b - a for a, b in zip([first, *later], later, strict=False)]
    return Call(
        requests=requests,
        tokens=tuple(tuple(row) for row in output[:, prompts.shape[1] :].tolist()),
        first_token_seconds=(first - started,) * len(requests),
        seconds=seconds,
        decode_step_seconds=tuple(gaps),
    )


class _TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` hands each step's tokens out."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002 - only the moment counts
        self.times.append(self._now())

    def end(self) -> None:
        """`serve` takes the end itself."""
