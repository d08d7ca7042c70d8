"""`POST /generate`: the native route, one prompt for one task, all that we know in the answer.

Runs on the event loop. A body with `inputs` is one of TGI's, which has a route of that name: it gets an answer of TGI's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.errors import InvalidParameter
from server.http.disconnect import unless_gone
from server.http.generation import Choice, Generation, Start, start_generation
from server.http.json_body import read_object, validated
from server.http.json_text import json_response
from server.http.openai_answer import answer_headers
from server.http.schemas import GenerateRequest
from server.http.services import request_id_of, services_of
from server.http.sse import Events, event, open_stream
from server.http.targets import find_target, session_key
from server.http.tgi import answer_tgi
from server.http.unsupported import NOT_IN_GENERATE, refuse_unsupported


async def generate(request: Request) -> Response:
    """Continues a prompt with a task's prefix, at once or as a stream."""
    services = services_of(request)
    value = await read_object(request, services.max_body_bytes)
    if "inputs" in value:
        return await answer_tgi(request, value)
    refuse_unsupported(value, NOT_IN_GENERATE)
    body = validated(GenerateRequest, value)
    key = session_key(request, body.user)
    target = find_target(services, body.task, "task", key)
    request_id = request_id_of(request)
    start = Start(request_id, "generate", target, body, [_prompt(body)])
    generation = await start_generation(request, start)
    headers = answer_headers(services, target)
    with_ids = bool(body.return_token_ids)
    if body.stream:
        events = _events(request_id, generation, with_ids)
        return await open_stream(request, events, generation.aclose, headers)
    try:
        await unless_gone(request.receive, generation.collect())
    finally:
        await generation.aclose()
    answer = _whole(request_id, generation, with_ids)
    return json_response(answer, headers=headers)


def _prompt(body: GenerateRequest) -> str | tuple[int, ...]:
    if not body.prompt:
        raise InvalidParameter("prompt: required, and not empty", param="prompt")
    return body.prompt if isinstance(body.prompt, str) else tuple(body.prompt)


def _whole(request_id: str, generation: Generation, with_ids: bool) -> dict[str, Any]:
    """One choice stands in the answer itself, several under `choices`."""
    choices = [_choice(c, c.text, c.token_ids, with_ids) for c in generation.choices]
    frame = {"id": f"gen-{request_id}", **generation.target.described()}
    if len(choices) == 1:
        del choices[0]["index"]
        return {**frame, **choices[0], **_summary(generation)}
    return {**frame, "choices": choices, **_summary(generation)}


async def _events(request_id: str, generation: Generation, with_ids: bool) -> Events:
    """A delta per increment; the last one carries the summary."""
    frame = {"id": f"gen-{request_id}", **generation.target.described()}
    async for choice, output in generation.outputs():
        delta = {**frame, **_choice(choice, output.text, output.token_ids, with_ids)}
        yield event({**delta, **_summary(generation)} if generation.finished else delta)


def _choice(choice: Choice, text: str, token_ids: Sequence[int], with_ids: bool) -> dict[str, Any]:
    ids = {"token_ids": list(token_ids)} if with_ids else {}
    return {
        "index": choice.index,
        "text": text,
        **ids,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _summary(generation: Generation) -> dict[str, Any]:
    timings = generation.timings
    prompt, output = generation.num_prompt_tokens, generation.num_output_tokens
    return {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prefix_tokens": generation.target.num_virtual_tokens,
            "cached_tokens": generation.num_cached_tokens,
        },
        "prefix_tier": generation.prefix_tier,
        "timings": {
            "queue_seconds": timings.queue_seconds,
            "first_token_seconds": timings.first_token_seconds,
            "total_seconds": timings.finished_seconds,
        },
    }
