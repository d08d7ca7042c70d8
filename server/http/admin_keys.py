"""API keys: made, listed, rotated, revoked, by the operator alone. `prefixd keys` does the same beside the server.

Runs on the event loop; each change is made durable in a worker thread. A key's text is in one answer, which nobody
may keep, and nowhere else.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.errors import UnknownKey
from prefix_store.key_store import DEFAULT_OVERLAP_SECONDS, KeyStore
from prefix_store.keys import KeyScope, NewKey, described_key
from prefix_store.spec import OPERATOR
from server.http.admin import note
from server.http.json_body import read_object, validated
from server.http.json_text import json_response
from server.http.services import Services, services_of

_NOT_KEPT: Final = {"cache-control": "no-store"}


class KeyRequest(BaseModel):
    """`POST /admin/v1/keys`. Without a tenant it is an operator's key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tenant: str | None = Field(default=None, min_length=1, max_length=64)
    scopes: list[KeyScope] = Field(min_length=1, max_length=3)
    expires_in_seconds: float | None = Field(default=None, strict=True)
    note: str = ""


class RotateRequest(BaseModel):
    """`POST .../rotate`: how long the old key goes on to work."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    overlap_seconds: float = DEFAULT_OVERLAP_SECONDS


async def create_key(request: Request) -> Response:
    """201 with the key's text, which is never shown again."""
    services = services_of(request)
    body = validated(KeyRequest, await read_object(request, services.max_body_bytes))
    make = partial(
        _keys(services).create,
        OPERATOR if body.tenant is None else body.tenant,
        frozenset(body.scopes),
        expires_in_seconds=body.expires_in_seconds,
        note=body.note,
    )
    return _shown(request, services, "create_key", await run_in_threadpool(make))


async def list_keys(
    request: Request, tenant: Annotated[str | None, Query(max_length=64)] = None
) -> Response:
    """All keys, or those of a tenant (`?tenant=` for the operator's), in the order in which they were made."""
    keys = services_of(request).keys
    data = [
        {"object": "key", **described_key(key)} for key in (keys.listed(tenant) if keys else [])
    ]
    return json_response({"object": "list", "data": data, "has_more": False})


async def rotate_key(request: Request, key_id: str) -> Response:
    """201 with the text of the key that takes the place of another, which ends after the overlap."""
    services = services_of(request)
    note(request, key=key_id)
    value = await read_object(request, services.max_body_bytes, optional=True)
    body = validated(RotateRequest, value)
    rotate = partial(_keys(services).rotate, key_id, overlap_seconds=body.overlap_seconds)
    return _shown(request, services, "rotate_key", await run_in_threadpool(rotate))


async def revoke_key(request: Request, key_id: str) -> Response:
    """Ends a key: it opens nothing from now on. Requests that run finish."""
    services = services_of(request)
    note(request, key=key_id)
    key = await run_in_threadpool(_keys(services).revoke, key_id)
    note(request, key_of=key.tenant)
    services.metrics.admin_operation("revoke_key", "done")
    return Response(status_code=204)


def _keys(services: Services) -> KeyStore:
    if services.keys is None:
        raise UnknownKey("this server keeps no keys")
    return services.keys


def _shown(request: Request, services: Services, operation: str, new: NewKey) -> Response:
    note(request, new_key=new.key.id, key_of=new.key.tenant)
    services.metrics.admin_operation(operation, "done")
    answer: dict[str, Any] = {"object": "key", **described_key(new.key), "key": new.text}
    return json_response(answer, 201, _NOT_KEPT)
