"""The admin API for listing, showing and deleting tasks; the other routes are in `admin_*`.

Runs on the event loop; what touches the disk goes through a worker thread.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.errors import PreconditionFailed
from prefix_store.spec import PrefixVersion, TaskInfo, tenant_of
from server.http.generation import free
from server.http.json_text import json_response
from server.http.preconditions import if_match
from server.http.services import services_of


async def list_tasks(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=128)] = "",
    q: Annotated[str, Query(max_length=128)] = "",
    tenant: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """Tasks by full name; `after` is the last name of the page before, `q` a part of the name, `tenant` the owner."""
    found = [
        info
        for info in services_of(request).store.tasks()
        if info.name > after and q in info.name and tenant in (None, tenant_of(info.name))
    ]
    page = found[:limit]
    answer = {
        "object": "list",
        "data": [summary(info) for info in page],
        "has_more": len(found) > len(page),
        "last_id": page[-1].name if page else None,
    }
    return json_response(answer)


async def get_task(request: Request, task: str) -> Response:
    """One task with all its versions, newest first."""
    info = services_of(request).store.task(task)
    answer = {**summary(info), "versions": described_versions(info)}
    return json_response(answer, headers=etag_of(info.live))


async def delete_task(request: Request, task: str) -> Response:
    """Removes a task with all its versions; requests that run with it finish, then its bytes go."""
    services = services_of(request)
    note(request, task=task)
    full = services.store.full_name(task)
    unnamed = await run_in_threadpool(services.store.delete, full, if_match=if_match(request))
    services.engine.unpin(full)
    await free(services, unnamed)
    services.metrics.forget_task(full)
    services.metrics.admin_operation("delete", "done")
    return Response(status_code=204)


def note(request: Request, **details: Any) -> None:
    """What the audit log is to say of this request, beside who asked and what was answered."""
    request.scope["prefixd.audit"].update(details)


def noted(request: Request, version: PrefixVersion) -> PrefixVersion:
    """`version`, noted for the audit log."""
    note(
        request,
        task=version.task,
        version=version.version,
        digest=version.digest,
        size=version.size_bytes,
    )
    return version


def live_as_expected(request: Request, info: TaskInfo) -> None:
    """Raises `PreconditionFailed` unless the live version is what If-Match says."""
    expected = if_match(request)
    got = info.live.digest if info.live else None
    if expected is not None and (got is None or expected not in ("*", got)):
        raise PreconditionFailed(f"the live version of task {info.name!r} is {got or 'not set'}")


def etag_of(version: PrefixVersion | None) -> dict[str, str]:
    """The ETag header: what a version is called in If-Match."""
    return {} if version is None else {"etag": f'"{version.digest}"'}


def described(version: PrefixVersion) -> dict[str, Any]:
    """One version, for every answer under `/admin`."""
    return {
        "task": version.task,
        "version": version.version,
        "digest": version.digest,
        "size": version.size_bytes,
        "num_virtual_tokens": version.manifest.num_virtual_tokens,
        "created_at": version.created_at,
        "description": version.manifest.description,
    }


def described_versions(info: TaskInfo) -> list[dict[str, Any]]:
    """All versions, newest first, each with the aliases that point to it."""
    return [
        {**described(version), "aliases": aliases_of(info, version)}
        for version in reversed(info.versions)
    ]


def aliases_of(info: TaskInfo, version: PrefixVersion) -> list[str]:
    """The aliases that point to a version."""
    canary = info.canary.version if info.canary else None
    return [name for name, at in (("live", info.live), ("canary", canary)) if at == version]


def summary(info: TaskInfo) -> dict[str, Any]:
    """A task: its live version, or the newest if none is live, and where its aliases point."""
    canary = info.canary and {
        "version": info.canary.version.version,
        "weight": info.canary.weight,
    }
    return {
        "object": "task",
        **described(info.live or info.versions[-1]),
        "tenant": tenant_of(info.name) or None,
        "grants": list(info.grants),
        "live": info.live and info.live.version,
        "previous": info.previous and info.previous.version,
        "canary": canary,
        "num_versions": len(info.versions),
    }
