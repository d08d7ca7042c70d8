"""`POST /admin/v1/tasks/{task}/compile`: a text prompt, or a conversation, baked into the prefix of a task.

Runs on the event loop; tokenizing, baking and storing happen elsewhere. Requests of the task then behave as
if each began with that text, which is computed once.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.importers.recognition import Provenance, Recognition
from server.errors import InvalidParameter
from server.http.admin import note
from server.http.admin_write import (
    check_conditions,
    check_name,
    conditions_of,
    counted,
    proving_slot,
    stored,
    tried,
)
from server.http.json_body import read_object, validated
from server.http.schemas import TokenIds
from server.http.services import Services, services_of


class ChatMessage(BaseModel):
    """One turn of a conversation, as the chat template reads it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    role: str = Field(min_length=1, max_length=32)
    content: str


class CompileRequest(BaseModel):
    """Exactly one of `prompt` and `messages`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    prompt: str | TokenIds | None = Field(default=None, description="A text, or its token ids")
    messages: list[ChatMessage] | None = Field(default=None, max_length=1024)
    add_generation_prompt: bool = Field(
        default=False, description="End with the template's beginning of an answer"
    )


async def compile_task(
    request: Request, task: str, activate: bool = True, dry_run: bool = False
) -> Response:
    """Bakes a prompt into a version, and with `activate` makes it live: 201 for a new task, else 200."""
    services = services_of(request)
    note(request, task=task)
    with counted(services):
        task = check_name(services, task)
        body = validated(CompileRequest, await read_object(request, services.max_body_bytes))
        conditions = conditions_of(request, activate)
        check_conditions(services.store, task, conditions)
        token_ids, assumed = await _tokens(services, body)
        provenance = _provenance(token_ids, assumed, body)
        async with (
            proving_slot(request),
            services.intake.compiled(token_ids, provenance) as examined,
        ):
            if dry_run:
                return tried(request, task, examined)
            return await stored(request, task, examined, conditions)


async def _tokens(
    services: Services, body: CompileRequest
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The prompt's tokens, and what was assumed to get them."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidParameter(
            "prompt: expected exactly one of prompt and messages", param="prompt"
        )
    if body.messages is not None:
        messages = [message.model_dump() for message in body.messages]
        tokens = await services.engine.tokenize_chat(messages, body.add_generation_prompt)
        return tokens, ("the tokenizer's chat template, special tokens as it writes them",)
    if isinstance(body.prompt, str):
        tokens = await services.engine.tokenize(body.prompt)
        plain = "the special tokens that the tokenizer adds to a prompt by default (a request's get them too)"
        return tokens, (plain,)
    return tuple(body.prompt or ()), ()


def _provenance(
    token_ids: tuple[int, ...], assumed: tuple[str, ...], body: CompileRequest
) -> Provenance:
    kind = "conversation" if body.messages is not None else "prompt"
    recognition = Recognition(
        f"{kind} of {len(token_ids)} tokens, baked on the resident model", assumed
    )
    digest = hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()
    return Provenance(kind, recognition, details={"token_ids_sha256": f"sha256:{digest}"})
