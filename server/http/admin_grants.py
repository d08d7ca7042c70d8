"""Letting another tenant use a task. The owner's hand, or the operator's; whoever got a grant can only run the task.

Runs on the event loop; each change is a durable record of the task's log, written in a worker thread.
"""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.spec import check_tenant_name
from server.http.admin import note, summary
from server.http.json_text import json_response
from server.http.services import services_of


async def put_grant(request: Request, task: str, tenant: str) -> Response:
    """Grants a task: from the next request on, the keys of `tenant` may infer with it. 200, also if they could."""
    services = services_of(request)
    full = services.store.full_name(task)
    note(request, task=full, granted_to=tenant)
    changed = await run_in_threadpool(services.store.grant, full, check_tenant_name(tenant))
    services.metrics.admin_operation("grant", "done" if changed else "unchanged")
    answer = {**summary(services.store.task(full)), "changed": changed}
    return json_response(answer)


async def delete_grant(request: Request, task: str, tenant: str) -> Response:
    """Ends a grant, if there is one. Requests that run finish."""
    services = services_of(request)
    full = services.store.full_name(task)
    note(request, task=full, granted_to=tenant)
    changed = await run_in_threadpool(services.store.end_grant, full, check_tenant_name(tenant))
    services.metrics.admin_operation("end_grant", "done" if changed else "unchanged")
    return Response(status_code=204)
