"""The admin API for reading and deleting tasks; uploads are in `admin_upload`.

Runs on the event loop; what touches the disk goes through a worker thread.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.spec import PrefixVersion, TaskInfo
from server.http.json_text import json_response
from server.http.preconditions import if_match
from server.http.services import services_of


async def list_tasks(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=128)] = "",
    q: Annotated[str, Query(max_length=128)] = "",
) -> Response:
    """Tasks by name; `after` is the last name of the page before, `q` a part of the name."""
    found = [t for t in services_of(request).store.tasks() if t.name > after and q in t.name]
    page = found[:limit]
    answer = {
        "object": "list",
        "data": [_summary(info) for info in page],
        "has_more": len(found) > len(page),
        "last_id": page[-1].name if page else None,
    }
    return json_response(answer)


async def get_task(request: Request, task: str) -> Response:
    """One task with all its versions, newest first."""
    info = services_of(request).store.task(task)
    versions = [described(version) for version in reversed(info.versions)]
    answer = {**_summary(info), "versions": versions}
    return json_response(answer, headers={"etag": f'"{info.live.digest}"'})


async def delete_task(request: Request, task: str) -> Response:
    """Removes a task with all its versions; requests that run with it finish undisturbed."""
    services = services_of(request)
    versions = services.store.task(task).versions
    await run_in_threadpool(services.store.delete, task, if_match=if_match(request))
    for version in versions:
        services.engine.evict(version.digest)
    services.metrics.forget_task(task)
    services.metrics.admin_operation("delete", "done")
    return Response(status_code=204)


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


def _summary(info: TaskInfo) -> dict[str, Any]:
    return {"object": "task", **described(info.live), "num_versions": len(info.versions)}
