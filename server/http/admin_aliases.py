"""Moving the aliases `live` and `canary` between a task's versions, and back.

Runs on the event loop; each move is a durable record, written in a worker thread.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.catalog import CANARY, LIVE
from prefix_store.errors import UnknownVersion
from prefix_store.spec import PrefixVersion
from server.errors import InvalidParameter
from server.http.admin import described, etag_of, note, noted
from server.http.json_body import read_object, validated
from server.http.json_text import json_response
from server.http.preconditions import if_match, if_none_match
from server.http.schemas import AliasRequest
from server.http.services import Services, services_of
from server.types import prefix_ref


async def get_alias(request: Request, task: str, alias: str) -> Response:
    """Where an alias points."""
    _check_alias(alias)
    services = services_of(request)
    version = services.store.resolve(f"{task}@{alias}")
    return _answer(services, alias, version)


async def put_alias(request: Request, task: str, alias: str) -> Response:
    """Points an alias at a version: `live` is a promotion, `canary` begins or changes a trial."""
    services = services_of(request)
    note(request, action=f"set_{alias[:16]}", task=task)
    _check_alias(alias)
    body = validated(AliasRequest, await read_object(request, services.max_body_bytes))
    note(request, version=body.version)
    move = _promote if alias == LIVE else _set_canary
    changed = await move(request, services, task, body)
    version = noted(request, services.store.resolve(f"{task}@v{body.version}"))
    warnings = await follow_pin(services, version) if changed and alias == LIVE else []
    services.metrics.admin_operation(f"set_{alias}", "done" if changed else "unchanged")
    return _answer(services, alias, version, changed=changed, warnings=warnings)


async def delete_canary(request: Request, task: str, alias: str) -> Response:
    """Ends a trial; `live` can be moved and not removed."""
    services = services_of(request)
    note(request, task=task)
    _check_alias(alias)
    if alias == LIVE:
        raise InvalidParameter("alias live: it can be moved, or the task deleted", param="alias")
    store = services.store
    await run_in_threadpool(store.end_canary, task, if_match=if_match(request))
    services.metrics.admin_operation("end_canary", "done")
    return Response(status_code=204)


async def roll_back(request: Request, task: str) -> Response:
    """Makes the version live that was so before the present one."""
    services = services_of(request)
    note(request, task=task)
    store = services.store
    version = await run_in_threadpool(store.rollback, task, if_match=if_match(request))
    noted(request, version)
    warnings = await follow_pin(services, version)
    services.metrics.admin_operation("rollback", "done")
    return _answer(services, LIVE, version, changed=True, warnings=warnings)


async def follow_pin(services: Services, version: PrefixVersion) -> list[str]:
    """A pinned task stays pinned with its new live version; a warning if the budget does not allow it."""
    refusal = await services.engine.follow_pin(prefix_ref(version))
    return [] if refusal is None else [f"the task is no longer pinned: {refusal}"]


async def _promote(request: Request, services: Services, task: str, body: AliasRequest) -> bool:
    if body.weight is not None:
        raise InvalidParameter("weight: only the canary has one", param="weight")
    if if_none_match(request):
        raise InvalidParameter("If-None-Match: not for the alias live", param="If-None-Match")
    promote = partial(services.store.promote, task, body.version, if_match=if_match(request))
    return await run_in_threadpool(promote)


async def _set_canary(request: Request, services: Services, task: str, body: AliasRequest) -> bool:
    note(request, weight=body.weight or 0.0)
    begin = partial(
        services.store.set_canary,
        task,
        body.version,
        body.weight or 0.0,
        if_match=if_match(request),
        if_none_match=if_none_match(request),
    )
    return await run_in_threadpool(begin)


def _check_alias(alias: str) -> None:
    if alias not in (LIVE, CANARY):
        raise UnknownVersion(f"alias {alias[:80]!r}: expected live or canary")


def _answer(services: Services, alias: str, version: PrefixVersion, **more: Any) -> Response:
    answer = {"object": "alias", "alias": alias, **described(version), **more}
    if alias == CANARY:
        canary = services.store.task(version.task).canary
        answer["weight"] = canary.weight if canary else None
    return json_response(answer, headers=etag_of(version))
