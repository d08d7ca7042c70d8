"""`POST /v1/completions`: OpenAI's text completions, where `model` names a task.

Runs on the event loop. What clients rely on, and break without, is noted beside each field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.http.generation import Choice, Generation, Start, start_generation
from server.http.json_body import read_object, validated
from server.http.logprobs import LogprobColumns
from server.http.openai_answer import (
    answer_headers,
    answered,
    frame,
    usage,
    usage_event,
    with_usage,
)
from server.http.schemas import CompletionRequest, StreamOptions
from server.http.services import Engine, request_id_of, services_of
from server.http.sse import Events, event
from server.http.targets import find_target, session_key
from server.http.unsupported import NOT_IN_COMPLETIONS, refuse_unsupported
from server.types import RequestOutput, TokenLogprob


async def create_completion(request: Request) -> Response:
    """Completes one or several prompts, at once or as a stream."""
    services = services_of(request)
    body, silent = _read(await read_object(request, services.max_body_bytes))
    prompts = body.prompts()
    # Before the target is looked up: from then on nothing may wait.
    echoes = await _texts(services.engine, prompts) if body.echo else ()
    target = find_target(services, body.model, "model", session_key(request, body.user))
    request_id = request_id_of(request)
    start = Start(
        request_id,
        "completions",
        target,
        body,
        prompts,
        stream=bool(body.stream),
        silent=silent,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    generation = await start_generation(request, start)
    answer = CompletionAnswer(
        frame("text_completion", f"cmpl-{request_id}", body.model, services, target),
        bool(body.return_token_ids),
        body.stream_options or StreamOptions(),
        echoes,
        LogprobWriter.to(body, services.engine),
    )
    headers = answer_headers(services, target)
    return await answered(request, generation, answer, headers, stream=bool(body.stream))


def _read(value: dict[str, Any]) -> tuple[CompletionRequest, bool]:
    """The body, and whether nothing is to be generated: of a prompt that is echoed, its tokens may be all."""
    refuse_unsupported(value, NOT_IN_COMPLETIONS)
    if value.get("logprobs") is False:  # a chat's way to ask for none
        value["logprobs"] = None
    if value.get("max_tokens") is None:  # the newer name of the same thing
        value["max_tokens"] = value.get("max_completion_tokens")
    body = validated(CompletionRequest, value)
    silent = bool(body.echo) and body.max_tokens == 0
    return (body.model_copy(update={"max_tokens": 1}) if silent else body), silent


async def _texts(engine: Engine, prompts: Sequence[str | tuple[int, ...]]) -> list[str]:
    """What each prompt says; the text of token ids as the tokenizer has it. Raises `InvalidParameter`."""
    return [
        prompt if isinstance(prompt, str) else await engine.detokenize(prompt, "prompt")
        for prompt in prompts
    ]


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """The words of OpenAI's answer. `frame`: the fields that every body and every chunk repeats.

    `echoes`: the text of each prompt, to stand before what continues it; empty if it is not to.
    """

    frame: dict[str, Any]
    token_ids: bool
    options: StreamOptions
    echoes: Sequence[str]
    logprobs: LogprobWriter | None
    _begun: set[int] = field(default_factory=set)  # choices of a stream whose prompt was echoed

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            self._choice(
                choice,
                self._echo(generation, choice) + choice.text,
                choice.token_ids,
                self._logprobs(generation, choice, choice.prompt_logprobs, choice.logprobs),
            )
            for choice in generation.choices
        ]
        return {**self.frame, "choices": choices, "usage": usage(generation)}

    async def events(self, generation: Generation) -> Events:
        """A chunk per increment, then the usage if it was asked for."""
        async for choice, output in generation.outputs():
            delta = self._delta(generation, choice, output)
            chunk = {**self.frame, "choices": [delta]}
            yield event(with_usage(chunk, generation, self.options))
        if self.options.include_usage:
            yield usage_event(self.frame, generation)

    def _delta(
        self, generation: Generation, choice: Choice, output: RequestOutput
    ) -> dict[str, Any]:
        logprobs = self._logprobs(generation, choice, output.prompt_logprobs, output.logprobs)
        text = output.text
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            text = self._echo(generation, choice) + text
        return self._choice(choice, text, output.token_ids, logprobs)

    def _echo(self, generation: Generation, choice: Choice) -> str:
        return self.echoes[generation.prompt_of(choice)] if self.echoes else ""

    def _logprobs(
        self,
        generation: Generation,
        choice: Choice,
        of_prompt: Sequence[TokenLogprob],
        of_output: Sequence[TokenLogprob],
    ) -> dict[str, Any] | None:
        """Of a whole answer or of an increment, the first of which has the prompt's if that is echoed."""
        if self.logprobs is None:
            return None
        columns = self.logprobs.columns(choice.index)
        if self.echoes and choice.index not in self._begun:
            columns.add_first(generation.prompts[generation.prompt_of(choice)][0])
        columns.add(of_prompt)
        columns.add(of_output)
        return columns.take()

    def _choice(
        self,
        choice: Choice,
        text: str,
        token_ids: list[int] | tuple[int, ...],
        logprobs: dict[str, Any] | None,
    ) -> dict[str, Any]:
        ids = {"token_ids": list(token_ids)} if self.token_ids else {}
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **ids,
        }


@dataclass(frozen=True, slots=True)
class LogprobWriter:
    """The columns of each choice, which go on from chunk to chunk."""

    engine: Engine
    skip_special_tokens: bool
    _columns: dict[int, LogprobColumns] = field(default_factory=dict)

    @classmethod
    def to(cls, body: CompletionRequest, engine: Engine) -> LogprobWriter | None:
        """What writes them for `body`, if it asks for any."""
        if body.logprobs is None:
            return None
        return cls(engine, body.skip_special_tokens is not False)

    def columns(self, index: int) -> LogprobColumns:
        """Those of one choice."""
        made = LogprobColumns(self.engine, self.skip_special_tokens)
        return self._columns.setdefault(index, made)
