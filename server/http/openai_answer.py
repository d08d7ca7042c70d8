"""What OpenAI's answers have in common, and how a whole or streamed answer leaves. Used by completions and chats.

Runs on the event loop. What clients rely on, and break without, is noted beside each field.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from server.http.disconnect import unless_gone
from server.http.generation import Generation
from server.http.json_text import json_response
from server.http.schemas import StreamOptions
from server.http.services import Services
from server.http.sse import Events, event, open_stream
from server.http.targets import Target
from server.http.told import written


class Answer(Protocol):
    """The words of an API for what a generation gives."""

    def whole(self, generation: Generation) -> dict[str, Any]: ...

    def events(self, generation: Generation) -> Events: ...


async def answered(
    request: Request,
    generation: Generation,
    answer: Answer,
    headers: Mapping[str, str],
    *,
    stream: bool,
) -> Response:
    """The response, once there is a first increment of a stream or all of a whole answer; closes the generation."""
    if stream:
        return await open_stream(request, answer.events(generation), generation.aclose, headers)
    try:
        await unless_gone(request.receive, generation.collect())
    finally:
        await generation.aclose()
    return await written(
        generation, lambda: json_response(answer.whole(generation), headers=headers)
    )


def frame(
    kind: str, answer_id: str, model: str | None, services: Services, target: Target
) -> dict[str, Any]:
    """The fields that every body and every chunk repeats. `kind`: aiperf and openai's helpers dispatch on it."""
    return {
        "id": answer_id,
        "object": kind,
        "created": int(datetime.now(UTC).timestamp()),
        "model": model,
        "system_fingerprint": system_fingerprint(services, target),
        "prefixd": target.described(),
    }


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


def with_usage(
    chunk: dict[str, Any], generation: Generation, options: StreamOptions
) -> dict[str, Any]:
    """A chunk with choices, and the usage so far if that was asked for."""
    if options.continuous_usage_stats:
        return {**chunk, "usage": usage(generation)}
    return {**chunk, "usage": None} if options.include_usage else chunk


def usage_event(frame: dict[str, Any], generation: Generation) -> bytes:
    """The usage of a stream, after its last choice: beside one, vllm bench would not see it."""
    return event({**frame, "choices": [], "usage": usage(generation)})


def system_fingerprint(services: Services, target: Target) -> str:
    """`<version>-<base>-<prefix>`: which build, which weights, which prefix answered."""
    base = services.base_fingerprint.removeprefix("sha256:")[:8]
    prefix = "base" if target.version is None else target.version.digest.removeprefix("sha256:")[:8]
    return f"{services.version}-{base}-{prefix}"


def answer_headers(services: Services, target: Target) -> dict[str, str]:
    """`x-prefixd-*`: task, version and digest if there is a prefix, and the fingerprint always."""
    fingerprint = system_fingerprint(services, target)
    return {**target.headers(), "x-prefixd-fingerprint": fingerprint}
