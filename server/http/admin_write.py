"""What every write of a task's prefix shares: its name, its turn, its metric, its answer.

Runs on the event loop; called by `admin_upload` and `admin_compile`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator
from typing import TypedDict

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.errors import InvalidTaskName, PrefixStoreError, UnknownTask
from server.engine.intake import Examined
from server.errors import RequestError
from server.http.admin import described, etag_of, note, noted
from server.http.admin_aliases import follow_pin
from server.http.json_text import json_response
from server.http.preconditions import if_match, if_none_match
from server.http.services import Services, services_of
from server.http.visible_store import VisibleStore


class Conditions(TypedDict):
    """Whether a write makes its version live, and what it depends on."""

    activate: bool
    if_match: str | None
    if_none_match: bool


def conditions_of(request: Request, activate: bool) -> Conditions:
    """The request's conditions. Raises `InvalidParameter`."""
    return {
        "activate": activate,
        "if_match": if_match(request),
        "if_none_match": if_none_match(request),
    }


def check_conditions(store: VisibleStore, task: str, conditions: Conditions) -> None:
    """Raises `PreconditionFailed` if the write would fail for it now, to spare the work."""
    store.check_preconditions(
        task, if_match=conditions["if_match"], if_none_match=conditions["if_none_match"]
    )


def check_name(services: Services, task: str) -> str:
    """The full name of the task to be written. Raises `InvalidTaskName`; `UnknownTask` if it would be another tenant's."""
    full = services.store.full_name(task)
    if services.model_id in (full, full.partition("~")[2]):
        raise InvalidTaskName(f"task name {task!r}: that is the base model, which has no prefix")
    return full


def exists(store: VisibleStore, task: str) -> bool:
    """Whether the task has a version now."""
    try:
        store.task(task)
    except UnknownTask:
        return False
    return True


def proving_slot(request: Request) -> asyncio.Semaphore:
    """To be held while a prefix is in memory."""
    slots = request.app.state.proving_slots
    assert isinstance(slots, asyncio.Semaphore)
    return slots


@contextlib.contextmanager
def counted(services: Services) -> Iterator[None]:
    """Counts a refusal; success is counted by `stored`."""
    try:
        yield
    except (PrefixStoreError, RequestError):
        services.metrics.admin_operation("upload", "refused")
        raise


async def stored(
    request: Request, task: str, examined: Examined, conditions: Conditions
) -> Response:
    """Makes an examined prefix a version of `task`: 201 for a new task, else 200; noted for the audit log."""
    services = services_of(request)
    task = check_name(services, task)  # the upload knows nothing of tenants
    existed = exists(services.store, task)
    report = examined.report()
    result = await run_in_threadpool(functools.partial(examined.upload.commit, task, **conditions))
    noted(request, result.version)
    note(request, created=result.created, activated=result.activated)
    if result.activated:
        report["warnings"] += await follow_pin(services, result.version)
    services.metrics.welcome_task(result.version.task)
    services.metrics.admin_operation("upload", "created" if result.created else "unchanged")
    answer = {
        "object": "task",
        **described(result.version),
        "created": result.created,
        "activated": result.activated,
        **report,
    }
    return json_response(answer, 200 if existed else 201, etag_of(result.version))


def tried(request: Request, task: str, examined: Examined) -> Response:
    """The answer to a dry run: what a write would have found; nothing is stored."""
    note(request, dry_run=True, digest=examined.upload.digest)
    services_of(request).metrics.admin_operation("upload", "dry_run")
    answer = {
        "object": "dry_run",
        "task": task,
        "digest": examined.upload.digest,
        "size": examined.upload.num_bytes,
        "num_virtual_tokens": examined.manifest.num_virtual_tokens,
        "description": examined.manifest.description,
        **examined.report(),
    }
    return json_response(answer)
