"""`POST /v1/completions`: OpenAI's text completions, where `model` names a task.

Runs on the event loop. What clients rely on, and break without, is noted beside each field.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.http.disconnect import unless_gone
from server.http.generation import Choice, Generation, Start, start_generation
from server.http.json_body import read_object, validated
from server.http.json_text import json_response
from server.http.schemas import CompletionRequest, StreamOptions, refuse_unsupported
from server.http.services import Services, request_id_of, services_of
from server.http.sse import Events, event, open_stream
from server.http.targets import Target, find_target, session_key
from server.types import RequestOutput


async def create_completion(request: Request) -> Response:
    """Completes one or several prompts, at once or as a stream."""
    services = services_of(request)
    value = await read_object(request, services.max_body_bytes)
    refuse_unsupported(value)
    if value.get("max_tokens") is None:  # the newer name of the same thing
        value["max_tokens"] = value.get("max_completion_tokens")
    body = validated(CompletionRequest, value)
    key = session_key(request, body.user)
    target = find_target(services, body.model, "model", key)
    request_id = request_id_of(request)
    start = Start(request_id, "completions", target, body, body.prompts())
    generation = await start_generation(request, start)
    answer = CompletionAnswer.to(body, target, services, request_id)
    if body.stream:
        events = answer.events(generation, body.stream_options or StreamOptions())
        return await open_stream(request, events, generation.aclose, target.headers())
    try:
        await unless_gone(request.receive, generation.collect())
    finally:
        await generation.aclose()
    return json_response(answer.whole(generation), headers=target.headers())


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """The words of OpenAI's answer. `frame`: the fields that every body and every chunk repeats."""

    frame: dict[str, Any]
    token_ids: bool

    @classmethod
    def to(
        cls, body: CompletionRequest, target: Target, services: Services, request_id: str
    ) -> CompletionAnswer:
        """The answer to `body`."""
        frame = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",  # aiperf and openai's helpers dispatch on it
            "created": int(datetime.now(UTC).timestamp()),
            "model": body.model,
            "system_fingerprint": system_fingerprint(services, target),
            "prefixd": target.described(),
        }
        return cls(frame, bool(body.return_token_ids))

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            self._choice(
                choice.index,
                choice.text,
                choice.token_ids,
                choice.finish_reason,
                choice.stop_reason,
            )
            for choice in generation.choices
        ]
        return {**self.frame, "choices": choices, "usage": usage(generation)}

    async def events(self, generation: Generation, options: StreamOptions) -> Events:
        """A chunk per increment, then the usage if it was asked for."""
        async for choice, output in generation.outputs():
            chunk = {**self.frame, "choices": [self._delta(choice, output)]}
            if options.continuous_usage_stats:
                chunk["usage"] = usage(generation)
            elif options.include_usage:
                chunk["usage"] = None
            yield event(chunk)
        if options.include_usage:
            # Beside a choice, vllm bench would not see it.
            yield event({**self.frame, "choices": [], "usage": usage(generation)})

    def _delta(self, choice: Choice, output: RequestOutput) -> dict[str, Any]:
        return self._choice(
            choice.index, output.text, output.token_ids, choice.finish_reason, choice.stop_reason
        )

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: list[int] | tuple[int, ...],
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if self.token_ids:
            choice["token_ids"] = list(token_ids)
        return choice


def usage(generation: Generation) -> dict[str, Any]:
    """OpenAI's usage. The prompt is what the user sent: virtual tokens are told apart, not billed."""
    prompt, output = generation.num_prompt_tokens, generation.num_output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {
            "cached_tokens": generation.num_cached_tokens,
            "prefix_tokens": generation.target.num_virtual_tokens,
        },
    }


def system_fingerprint(services: Services, target: Target) -> str:
    """`<version>-<base>-<prefix>`: which build, which weights, which prefix answered."""
    base = services.base_fingerprint.removeprefix("sha256:")[:8]
    prefix = "base" if target.version is None else target.version.digest.removeprefix("sha256:")[:8]
    return f"{services.version}-{base}-{prefix}"
