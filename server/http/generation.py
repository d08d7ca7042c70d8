"""One HTTP request under way: its prompts are in the engine, its choices come back here.

Runs on the event loop; used by `completions`, `chat`, `generate` and `tgi`, which only differ in the words of the answer.
Whoever starts a `Generation` must `aclose` it: that is what frees the engine when a client leaves.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from prefix_store.errors import PrefixUnavailable, UnknownTask
from server.errors import (
    ContextTooLong,
    DeadlineExceeded,
    EngineOverloaded,
    EngineStopped,
    GenerationFailed,
    ModelNotFound,
)
from server.http.caller import caller_of
from server.http.deadline import deadline_of, within
from server.http.disconnect import unless_gone
from server.http.merged_streams import merged, next_of
from server.http.request_log import note_generation
from server.http.schemas import SamplingFields
from server.http.services import Engine, OutputStream, Services, services_of
from server.http.targets import Defaults, Target, sampling_params
from server.http.tokenizing import Prompt, tokenized, tokenizer_queue_of
from server.http.told import within_bound
from server.types import (
    FinishReason,
    GenerationRequest,
    PrefixTier,
    RequestOutput,
    RequestTimings,
    TokenLogprob,
)

_REJECTIONS: Final[dict[type[Exception], str]] = {
    EngineOverloaded: "queue_full",
    EngineStopped: "stopped",
    ContextTooLong: "too_long",
    DeadlineExceeded: "deadline",
}


@dataclass(slots=True)
class Choice:
    """What one choice has gained so far; a stream's log-probabilities have gone with its increments."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_output_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def take(self, output: RequestOutput, *, keep_logprobs: bool) -> None:
        """Adds an increment."""
        self.text += output.text
        self.token_ids.extend(output.token_ids)
        self.num_output_tokens = output.num_output_tokens
        if keep_logprobs:
            self.logprobs.extend(output.logprobs)
            self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason.value
            self.stop_reason = output.stop_reason
        if output.finish_reason is FinishReason.DEADLINE:  # a word that clients do not know
            self.finish_reason, self.stop_reason = FinishReason.LENGTH.value, "deadline"


class Generation:
    """The streams of all prompts, read as one. Choice `i` of prompt `p` has the index `p * n + i`."""

    def __init__(
        self,
        start: Start,
        services: Services,
        streams: Sequence[OutputStream],
        n: int,
        prompts: Sequence[tuple[int, ...]],
    ) -> None:
        self.target = start.target
        self.prompts = prompts
        self._services = services
        self._released = False
        self._start = start
        self.choices = [Choice(index) for index in range(len(streams) * n)]
        self.timings = RequestTimings()
        self.prefix_tier = PrefixTier.NONE
        self._num_cached = [0] * len(streams)
        self._streams = streams
        self._n = n

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts; those of the prefix are no prompt."""
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.num_output_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompts that were in the prompt cache. A prompt's first choice speaks for all of them: the
        others find what it has computed.
        """
        return sum(self._num_cached)

    @property
    def num_told(self) -> int:
        """Log-probabilities that the choices hold."""
        of_output = sum(len(choice.logprobs) for choice in self.choices)
        of_prompts = sum(len(choice.prompt_logprobs) for choice in self.choices)
        start = self._start
        return of_output * (1 + (start.logprobs or 0)) + of_prompts * (
            1 + (start.prompt_logprobs or 0)
        )

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    def prompt_of(self, choice: Choice) -> int:
        """The number of the prompt that a choice continues."""
        return choice.index // self._n

    async def outputs(self) -> AsyncGenerator[tuple[Choice, RequestOutput], None]:
        """Each increment, with the choice that has taken it. Raises `GenerationFailed`, `EngineStopped`."""
        if len(self._streams) > 1:
            async with contextlib.aclosing(merged(self._streams)) as together:
                async for number, output in together:
                    yield self._take(number, output)
            return
        # One prompt is the usual case, and a task for each token would cost more than the rest of this layer.
        while (gained := await next_of(self._streams[0])) is not None:
            yield self._take(0, gained)

    async def collect(self) -> list[Choice]:
        """Waits for all choices. Raises as `outputs` does."""
        async for _ in self.outputs():
            pass
        return self.choices

    async def aclose(self) -> None:
        """Aborts what still runs, and lets go of the prefix. Harmless when repeated."""
        for stream in self._streams:
            await stream.aclose()
        if not self._released:
            self._released = True
            await let_go(self._services, self.target)

    def _take(self, number: int, output: RequestOutput) -> tuple[Choice, RequestOutput]:
        if output.finish_reason is FinishReason.ERROR:
            raise GenerationFailed(output.error or "the request failed while it ran")
        if output.finish_reason is FinishReason.ABORT:
            raise EngineStopped(output.error or "the request was ended; try again")
        if output.finish_reason is FinishReason.PREFIX_UNAVAILABLE:
            raise PrefixUnavailable(output.error or "the prefix of this task can not be loaded")
        if output.finish_reason is FinishReason.DEADLINE and self._is_nothing(output):
            raise DeadlineExceeded("the request's time was over before its first token")
        if self._start.silent:
            output = _without_tokens(output)
        choice = self.choices[number * self._n + output.index]
        choice.take(output, keep_logprobs=not self._start.stream)
        if output.index == 0:
            self._num_cached[number] = output.num_cached_tokens
        self.timings = output.timings
        self.prefix_tier = output.prefix_tier
        return choice, output

    def _is_nothing(self, cut: RequestOutput) -> bool:
        """Whether an answer would be empty, or lack what it was asked for: a prompt is told of with a choice's first token,
        and a reader of an empty list would take it for a score.
        """
        if cut.num_output_tokens:
            return False
        return self._start.prompt_logprobs is not None or not self.num_output_tokens


def _without_tokens(output: RequestOutput) -> RequestOutput:
    """What a request for no tokens gains: the engine samples one, which costs nothing beside the prompt."""
    reason = output.finish_reason and FinishReason.LENGTH
    return replace(
        output,
        text="",
        token_ids=(),
        num_output_tokens=0,
        finish_reason=reason,
        stop_reason=None,
        logprobs=(),
    )


@dataclass(frozen=True, slots=True)
class Start:
    """What `start_generation` needs of a request, in the words of no particular API.

    `stream`: the choices keep no log-probabilities. `silent`: nothing of what is generated is wanted, only what came of the
    prompt. `logprobs`, `prompt_logprobs`: as
    in `SamplingParams`. `truncate`: so many tokens of a prompt's end are used.
    """

    request_id: str
    endpoint: str
    target: Target
    fields: SamplingFields
    prompts: Sequence[Prompt]
    defaults: Defaults = field(default_factory=Defaults)
    stream: bool = False
    silent: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate: int | None = None
    deadline: float | None = None


async def start_generation(request: Request, start: Start) -> Generation:
    """Submits every prompt, or none. Raises what `sampling_params` and `Engine.submit` raise;
    `ClientDisconnect` if the client leaves first, `EngineOverloaded` if too much is before it, `DeadlineExceeded`.

    The prefix's bytes are held from now until the generation is closed: a deleted task's last requests
    finish with the version that they began with. No `await` may come between finding the target and this.
    """
    services, deadline = services_of(request), deadline_of(request)
    start = replace(start, deadline=deadline)
    if start.target.version is not None:
        try:
            services.store.hold(start.target.version)
        except UnknownTask as error:
            raise ModelNotFound(str(error)) from None
    try:
        with _counted_rejections(services, start):
            with tokenizer_queue_of(request).room_for(start.prompts):
                special = start.fields.add_special_tokens is not False
                encoded = tokenized(services.engine, start.prompts, special_tokens=special)
                async with within(deadline):
                    prompts = await unless_gone(request.receive, encoded)
            if start.truncate is not None:
                prompts = [prompt[-start.truncate :] for prompt in prompts]
            generation = await _start(services, caller_of(request).tenant, start, prompts)
            note_generation(request, generation)
            return generation
    except BaseException:
        await let_go(services, start.target)
        raise


async def let_go(services: Services, target: Target) -> None:
    """Ends a hold; the last one of a deleted prefix frees its bytes and blocks."""
    digest = target.version.digest if target.version else None
    if digest is not None and services.store.release(digest):
        await free(services, [digest])


async def free(services: Services, digests: Sequence[str]) -> None:
    """Removes what nobody names or holds from disk, host memory and device."""
    for digest in digests:
        if await run_in_threadpool(services.store.free, digest):
            services.engine.evict(digest)


async def _start(
    services: Services, tenant: str, start: Start, prompts: Sequence[tuple[int, ...]]
) -> Generation:
    longest = max(len(prompt) for prompt in prompts)
    room = services.engine.room(start.target.prefix, longest)
    params = replace(
        sampling_params(start.fields, start.target, room, start.defaults),
        logprobs=start.logprobs,
        prompt_logprobs=start.prompt_logprobs,
    )
    params = within_bound(
        params,
        prompts,
        keeps_output=not (start.stream or start.silent),
        is_default=start.fields.max_tokens is None,
    )
    requests = [
        GenerationRequest(
            request_id=f"{start.request_id}-{number}",
            prompt_token_ids=prompt,
            sampling=params,
            prefix=start.target.prefix,
            endpoint=start.endpoint,
            version_role=start.target.role,
            tenant=tenant,
            # A tenant's name has no ~, so no salt that a client sends can reach another tenant's blocks.
            cache_salt=f"{tenant}~{start.fields.cache_salt or ''}",
            deadline=start.deadline,
        )
        for number, prompt in enumerate(prompts)
    ]
    streams = await _submit_all(services.engine, requests)
    return Generation(start, services, streams, params.n, prompts)


async def _submit_all(engine: Engine, requests: Sequence[GenerationRequest]) -> list[OutputStream]:
    streams: list[OutputStream] = []
    try:
        for request in requests:
            streams.append(engine.submit(request))  # noqa: PERF401 - a refusal needs those so far
    except Exception:
        for stream in streams:
            await stream.aclose()
        raise
    return streams


@contextlib.contextmanager
def _counted_rejections(services: Services, start: Start) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = _REJECTIONS.get(type(error))
        if reason is not None:
            task = start.target.version.task if start.target.version else ""
            services.metrics.rejected(reason, task, start.endpoint)
        raise
