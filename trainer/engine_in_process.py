"""The server's own engine around a model that is in memory already: no HTTP, nothing on disk.

Runs on the main thread, which waits; meanwhile the model belongs to the engine thread, or to the forward
passes of `likelihood`. Called by `evaluate`, and between two steps by a training loop that stops early on a
generated metric: transformers' own attention is back on the model whenever a method has returned. A prefix
comes as the bytes of its artifact and is proved as an upload is, so what can be judged can be served.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import Tensor

from prefix_store import PrefixStore
from prefix_store.artifact import Prefix
from prefix_store.backends.memory import MemoryBackend
from prefix_store.spec import BaseSpec
from prefix_store.validation import Limits
from server.bootstrap import assemble_engine
from server.config import ServeConfig
from server.engine.async_engine import AsyncEngine
from server.engine.tokenizer import Tokenizer
from server.errors import GenerationFailed, RequestError
from server.model.attention import make_attention_backend
from server.model.base_spec import base_spec
from server.model.loader import ATTENTION_NAME, LoadedModel
from server.sizing import plan_for
from server.types import (
    FinishReason,
    GenerationRequest,
    PrefixRef,
    RequestStats,
    SamplingParams,
    StepStats,
    prefix_ref,
)
from trainer.errors import TrainerError
from trainer.likelihood import TextToScore, token_losses

MAX_NUM_SEQS: Final = 32
_BLOCK_SIZE: Final = 16
_TASK: Final = (
    "evaluated"  # the one task of the store in memory; its versions are what is evaluated
)
_HOST_CACHE_BYTES: Final = 2**30
_LONGEST_PREFIX: Final = (
    1_000_000  # what the format allows; the positions of the model bound it further
)

Progress = Callable[[int, int], None]
"""Called with how many are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is continued. `artifact`: bytes of the prefix before it; None for the bare base model. `seed`: its own."""

    token_ids: tuple[int, ...]
    artifact: bytes | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What came. `token_ids` hold the token that ended it, which has no text.

    `first_token_seconds`: since it was submitted, waiting included.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    first_token_seconds: float = field(compare=False)


class EngineInProcess:
    """Generates and scores with a loaded model. Not reentrant, and not for use inside an event loop."""

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        *,
        base: BaseSpec | None = None,
        max_num_seqs: int = MAX_NUM_SEQS,
    ) -> None:
        """`base`: what `base_spec` gave for both, if the caller has it; it reads all the weights."""
        self._model = model
        self._tokenizer = tokenizer
        with own_attention(model):
            self.base = base or base_spec(model, tokenizer_fingerprint=tokenizer.fingerprint())
        self._max_num_seqs = max_num_seqs
        self._store = PrefixStore(
            MemoryBackend(),
            self.base,
            Limits(max_num_virtual_tokens=_LONGEST_PREFIX),
            host_cache_bytes=_HOST_CACHE_BYTES,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_progress: Progress | None = None,
        *,
        one_by_one: bool = False,
        fitting: bool = False,
    ) -> list[Completion]:
        """One completion for each prompt, in their order, batched as the server batches.

        `one_by_one`: each is alone in the engine, and prefixes stay resident from one to the next: for timing.
        `fitting`: where the model has fewer positions left than `max_tokens`, these are all, as the server does with
        a default of `max_tokens`; otherwise such a prompt does not fit.

        Raises `PrefixRejected` for an artifact that a server would refuse, `TrainerError` for a prompt that does not
        fit (it says which), `GenerationFailed` when a row failed.
        """
        assert sampling.n == 1, "one completion a prompt"
        if not prompts:
            return []
        with self._published(prompts) as refs, own_attention(self._model):
            together = 1 if one_by_one else self._max_num_seqs
            engine = self._engine(prompts, sampling, refs, together)
            limit = self._model.position_limit if fitting else None
            requests = [
                _request(index, prompt, sampling, refs, limit)
                for index, prompt in enumerate(prompts)
            ]
            in_flight = 1 if one_by_one else 2 * together
            return asyncio.run(_generate(engine, requests, in_flight, on_progress))

    def token_losses(self, artifact: bytes | None, texts: Sequence[TextToScore]) -> list[Tensor]:
        """Nats of each target token of each text behind the same prefix, as `likelihood.token_losses` gives them.

        Raises `PrefixRejected`, and `TrainerError` for a text that the model has no positions for.
        """
        prefix = None if artifact is None else self.prefix(artifact)
        self._check_positions(prefix.manifest.first_position if prefix else 0, texts)
        with own_attention(self._model):
            return token_losses(self._model, prefix, texts)

    def prefix(self, artifact: bytes) -> Prefix:
        """The tensors as the engine has them: proved, and in the serving dtype. Raises `PrefixRejected`."""
        with self._published([Prompt((), artifact)]) as refs:
            return self._store.load(refs[artifact].digest).prefix

    @contextlib.contextmanager
    def _published(self, prompts: Sequence[Prompt]) -> Iterator[dict[bytes, PrefixRef]]:
        """The artifacts as versions in the store, for as long as they are used."""
        artifacts = {prompt.artifact for prompt in prompts if prompt.artifact is not None}
        refs = {data: prefix_ref(self._store.put(_TASK, data).version) for data in artifacts}
        try:
            yield refs
        finally:
            for digest in self._store.delete(_TASK) if refs else ():
                self._store.free(digest)

    def _engine(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        refs: dict[bytes, PrefixRef],
        together: int,
    ) -> AsyncEngine:
        """An engine whose pool holds what `together` of these prompts need and no more: the trainer has memory of its own."""
        longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_tokens
        num_own = min(together, len(prompts)) * -(-longest // _BLOCK_SIZE)
        num_prefix = sum(-(-ref.num_virtual_tokens // _BLOCK_SIZE) for ref in refs.values())
        # Not `ServeConfig(...)`: variables and files that configure a server must not change an evaluation.
        config = ServeConfig.model_construct(
            model=self._model.model_id,
            max_num_seqs=self._max_num_seqs,
            block_size=_BLOCK_SIZE,
            num_kv_blocks=1 + num_own + num_prefix,
            seed=0,
        )
        return assemble_engine(
            config,
            self._model,
            make_attention_backend(config.attention, self._model.device),
            self._tokenizer,
            self._store,
            plan_for(config, self._model),
            _Unobserved(),
        ).engine

    def _check_positions(self, first: int, texts: Sequence[TextToScore]) -> None:
        limit = self._model.position_limit
        for index, text in enumerate(texts):
            if limit is not None and first + len(text.fed) > limit:
                raise TrainerError(
                    f"text {index + 1}: {len(text.fed)} tokens from position {first}; "
                    f"the model has {limit} positions"
                )


@contextlib.contextmanager
def own_attention(model: LoadedModel) -> Iterator[None]:
    """Has the model call the engine's attention meanwhile, and then what it called before."""
    module: Any = model.module
    before = module.config._attn_implementation
    module.set_attn_implementation(ATTENTION_NAME)
    try:
        # Whatever is connected meanwhile goes, and with it the memory of its KV pool.
        with model.connected(module.prefixd_attention):
            yield
    finally:
        module.set_attn_implementation(before)


def _request(
    index: int,
    prompt: Prompt,
    sampling: SamplingParams,
    refs: dict[bytes, PrefixRef],
    position_limit: int | None,
) -> GenerationRequest:
    """With the prompt's own seed, and no more tokens than `position_limit` leaves; at least one, which is refused."""
    prefix = None if prompt.artifact is None else refs[prompt.artifact]
    if prompt.seed is not None:
        sampling = replace(sampling, seed=prompt.seed)
    if position_limit is not None:
        before = 0 if prefix is None else max(prefix.num_virtual_tokens, prefix.first_position)
        room = position_limit - before - len(prompt.token_ids)
        sampling = replace(sampling, max_tokens=max(1, min(sampling.max_tokens, room)))
    return GenerationRequest(str(index), prompt.token_ids, sampling, prefix)


class _Unobserved:
    """Nobody scrapes an evaluation."""

    def on_step(self, stats: StepStats) -> None:
        """Ignored."""

    def on_request(self, stats: RequestStats) -> None:
        """Ignored."""


async def _generate(
    engine: AsyncEngine,
    requests: Sequence[GenerationRequest],
    max_in_flight: int,
    on_progress: Progress | None,
) -> list[Completion]:
    """All of them, at most `max_in_flight` submitted at a time, so that no queue is ever full."""
    num_done = 0
    turn = asyncio.Semaphore(max_in_flight)

    async def complete(request: GenerationRequest) -> Completion:
        nonlocal num_done
        async with turn:
            completion = await _complete(engine, request)
        num_done += 1
        if on_progress is not None:
            on_progress(num_done, len(requests))
        return completion

    await engine.start()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(complete(request)) for request in requests]
    except* (TrainerError, GenerationFailed) as failures:
        raise failures.exceptions[0] from None
    finally:
        await engine.stop()
    return [task.result() for task in tasks]


async def _complete(engine: AsyncEngine, request: GenerationRequest) -> Completion:
    number = int(request.request_id) + 1
    try:
        stream = engine.submit(request)
    except RequestError as error:
        raise TrainerError(f"prompt {number}: {error}") from error
    text, token_ids = "", list[int]()
    reason: FinishReason | None = None
    first_token_seconds: float | None = None
    async for output in stream:
        if output.error is not None:
            raise GenerationFailed(f"prompt {number}: {output.error}")
        text += output.text
        token_ids += output.token_ids
        reason = output.finish_reason
        first_token_seconds = output.timings.first_token_seconds
    assert reason is not None, "a stream ends with a finish reason"
    assert first_token_seconds is not None, "a stream that did not fail has a first token"
    return Completion(text, tuple(token_ids), reason, first_token_seconds)
