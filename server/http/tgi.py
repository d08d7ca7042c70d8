"""TGI's protocol, which huggingface_hub and lorax-client speak: `/generate_stream`, `POST /`, `/info`, and `/generate`
where the body has `inputs`.

Runs on the event loop. All errors leave in TGI's shape, also those of a stream, which ends without a `[DONE]`:
lorax-client would take that for a token.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.http.disconnect import unless_gone
from server.http.generation import Generation, Start, start_generation
from server.http.json_body import read_object, validated
from server.http.json_text import json_response
from server.http.openai_answer import answer_headers
from server.http.services import Services, request_id_of, services_of
from server.http.sse import StreamStyle, open_stream
from server.http.targets import Target, find_target, session_key
from server.http.tgi_answer import TgiAnswer
from server.http.tgi_errors import tgi_error_object, tgi_error_response
from server.http.tgi_schemas import NOT_IN_TGI, TGI_DEFAULTS, TgiParameters, TgiRequest
from server.http.told import written
from server.http.unsupported import refuse_unsupported
from server.types import MAX_STOP_STRINGS

_STREAM: Final = StreamStyle(tgi_error_object, end=b"")


async def generate_stream(request: Request) -> Response:
    """`POST /generate_stream`: always a stream."""
    value = await read_object(request, services_of(request).max_body_bytes)
    return await answer_tgi(request, {**value, "stream": True})


async def generate_at_root(request: Request) -> Response:
    """`POST /`: what huggingface_hub calls; a whole answer is in a list."""
    value = await read_object(request, services_of(request).max_body_bytes)
    return await answer_tgi(request, value, in_list=True)


async def answer_tgi(request: Request, value: dict[str, Any], *, in_list: bool = False) -> Response:
    """The answer to a body of TGI's, errors included."""
    return await _in_its_shape(request, _answer(request, value, in_list=in_list))


async def info(request: Request) -> Response:
    """`GET /info`: what serves here, by TGI's names."""
    services = services_of(request)
    length = services.engine.max_model_len
    answer = {
        "model_id": services.model_id,
        "model_sha": services.base_fingerprint,
        "model_pipeline_tag": "text-generation",
        "max_best_of": 1,
        "max_stop_sequences": MAX_STOP_STRINGS,
        "max_input_tokens": length - 1,
        "max_total_tokens": length,
        "max_client_batch_size": 1,
        "router": "prefixd",
        "version": services.version,
    }
    return json_response(answer)


async def _in_its_shape(request: Request, work: Awaitable[Response]) -> Response:
    try:
        return await work
    except ClientDisconnect:
        raise
    except Exception as error:  # noqa: BLE001 - beyond here it would get OpenAI's shape
        return tgi_error_response(error, request_id_of(request))


async def _answer(request: Request, value: dict[str, Any], *, in_list: bool) -> Response:
    services = services_of(request)
    given = value.get("parameters")
    refuse_unsupported(given if isinstance(given, dict) else {}, NOT_IN_TGI)
    body = validated(TgiRequest, value)
    parameters = body.parameters or TgiParameters()
    target = find_target(
        services, parameters.adapter_id, "adapter_id", session_key(request, user=None)
    )
    generation = await start_generation(request, _start(request, body, parameters, target))
    before = body.inputs if parameters.return_full_text else ""
    answer = TgiAnswer(services.engine, parameters, before)
    headers = answer_headers(services, target)
    if body.stream:
        events = answer.events(generation)
        return await open_stream(request, events, generation.aclose, headers, _STREAM)
    try:
        await unless_gone(request.receive, generation.collect())
    finally:
        await generation.aclose()
    whole = await written(generation, lambda: answer.whole(generation))
    headers |= _timing_headers(services, generation)
    return json_response([whole] if in_list else whole, headers=headers)


def _start(request: Request, body: TgiRequest, parameters: TgiParameters, target: Target) -> Start:
    # A stream's tokens have theirs always; those of the whole only where they are listed.
    told = body.stream or parameters.details or parameters.decoder_input_details
    return Start(
        request_id_of(request),
        "generate",
        target,
        parameters.sampling_fields(),
        [body.inputs],
        defaults=TGI_DEFAULTS,
        stream=bool(body.stream),
        logprobs=(parameters.top_n_tokens or 0) if told else None,
        prompt_logprobs=0 if parameters.decoder_input_details and not body.stream else None,
        truncate=parameters.truncate,
    )


def _timing_headers(services: Services, generation: Generation) -> dict[str, str]:
    """LoRAX's: where the time went, in milliseconds, and how many tokens there were."""
    timings = generation.timings
    total, queue = timings.finished_seconds or 0.0, timings.queue_seconds or 0.0
    prompt, output = generation.num_prompt_tokens, generation.num_output_tokens
    seconds = {
        "total-time": total,
        "queue-time": queue,
        "inference-time": total - queue,
        "time-to-first-token": timings.first_token_seconds or 0.0,
        "time-per-token": (total - queue) / max(output, 1),
    }
    version = generation.target.version
    return {
        **{f"x-{name}": f"{value * 1e3:.1f}" for name, value in seconds.items()},
        "x-prompt-tokens": str(prompt),
        "x-generated-tokens": str(output),
        "x-total-tokens": str(prompt + output),
        "x-model-id": services.model_id,
        **({} if version is None else {"x-adapter-id": version.task}),
    }
