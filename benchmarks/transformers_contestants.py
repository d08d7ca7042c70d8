"""transformers as a contestant, without PEFT: `generate` over one static batch, and continuous batching.

Neither knows learned prefixes. Each prompt begins with its task's prefix as text instead, so that as many tokens
are attended over. Both run in the model's own dtype, uncompiled, as prefixd does; of the attention implementations
and chunk sizes that matter on a CPU `fastest` takes the best by trial, in the run that is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.contest import Call, Contestant
from benchmarks.peft_contestants import generate
from benchmarks.token_times import steady_gaps
from benchmarks.workload import Request

Texts = Mapping[str, tuple[int, ...]]
_MIN_PAGE: Final = 4  # transformers refuses smaller ones


def load_plain_model(model_dir: Path) -> Any:
    """The model in its own dtype, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(str(model_dir), dtype="auto").eval()


def with_text(requests: Sequence[Request], texts: Texts) -> tuple[Request, ...]:
    """The requests with their task's text, if there is one, before their prompts."""
    return tuple(
        replace(r, prompt_token_ids=texts.get(r.task, ()) + r.prompt_token_ids) for r in requests
    )


class StaticBatch:
    """`generate` over all requests at once, which it can since they have one length and begin and end together."""

    name: Final = "hf_static"

    def __init__(self, model: Any, texts: Texts, attention: Literal["sdpa", "eager"]) -> None:
        self._model = model
        self._texts = texts
        self._attention = attention
        self.description: Final = f"transformers, one batch, attention {attention}"

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """One call, whose texts go through the model with the prompts."""
        return [with_text(requests, self._texts)]

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        """All prompts in one forward pass, then one for each token."""
        self._model.set_attn_implementation(self._attention)
        return generate(self._model, requests, output_len)

    def close(self) -> None:
        """Nothing runs between calls."""


class ContinuousBatch:
    """transformers' paged scheduler. `chunk`: tokens of a step, by which prompts are cut.

    Without Flash Attention, on a CPU, each step attends with one dense mask over the tokens of all its requests, so
    smaller chunks waste less on the pairs that the mask forbids. Pages are as long as the text prefixes, so that a
    text is computed for the first request of its task and shared by the others.
    """

    name: Final = "hf_continuous"

    def __init__(
        self,
        model: Any,
        texts: Texts,
        attention: Literal["sdpa", "paged|eager"],
        *,
        chunk: int,
        max_requests: int,
        max_tokens: int,
    ) -> None:
        """`max_tokens`: of all requests together, text, prompt and output."""
        self._model = model
        self._texts = texts
        self._attention = attention
        self.description: Final = (
            f"transformers' continuous batching, attention {attention}, {chunk} tokens a step"
        )
        page = max(_MIN_PAGE, *(len(text) for text in texts.values())) if texts else 16
        model.set_attn_implementation(attention)
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page,
                # A page of each request is not full, and one of each is kept free for the next token.
                num_blocks=max_tokens // page + 2 * max_requests,
                max_batch_tokens=chunk,
                max_requests_per_batch=max_requests,
                allow_block_sharing=bool(texts),
                auto_switch_to_flash=False,
            ),
        )

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """One call: it takes as many requests as there are."""
        return [with_text(requests, self._texts)]

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        """Forgets all that earlier calls left in the cache, then serves as `generate_batch` does."""
        manager = self._manager
        self._model.set_attn_implementation(self._attention)
        if manager.batch_processor is not None:
            manager.batch_processor.cache.reset()
        manager.start()
        started = time.perf_counter()
        names = manager.add_requests(
            [list(r.prompt_token_ids) for r in requests],
            max_new_tokens=output_len,
            record_timestamps=True,
        )
        answers = self._collect(len(names))
        seconds = time.perf_counter() - started
        manager.stop(block=True, keep_for_next_session=True)
        return _call(requests, [answers[name] for name in names], started, seconds)

    def _collect(self, number: int) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        while len(answers) < number:
            answer = self._manager.get_result(timeout=1)
            if answer is not None:
                if answer.error is not None:
                    raise RuntimeError(f"transformers: {answer.request_id}: {answer.error}")
                answers[answer.request_id] = answer
            elif not self._manager.is_running():
                raise RuntimeError("transformers' generation thread ended")
        return answers

    def close(self) -> None:
        self._manager.destroy()


def _call(
    requests: tuple[Request, ...], answers: Sequence[Any], started: float, seconds: float
) -> Call:
    times = [[t - started for t in answer.timestamps] for answer in answers]
    return Call(
        requests=requests,
        tokens=tuple(tuple(answer.generated_tokens) for answer in answers),
        first_token_seconds=tuple(t[0] for t in times),
        seconds=seconds,
        decode_step_seconds=steady_gaps(times),
    )


def fastest(
    candidates: Sequence[Contestant],
    requests: Sequence[Request],
    output_len: int,
    progress: Callable[[str], None],
) -> Contestant:
    """The candidate with the shortest second call over all requests; the others are closed."""
    times = []
    for candidate in candidates:
        call = candidate.calls(requests)[0]
        candidate.serve(call, output_len=2)
        times.append(candidate.serve(call, output_len).seconds)
        progress(f"tried {candidate.description}: {times[-1]:.1f} s for {output_len} tokens")
    best = candidates[times.index(min(times))]
    for candidate in candidates:
        if candidate is not best:
            candidate.close()
    return best
