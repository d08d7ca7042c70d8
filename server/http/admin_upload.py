"""`PUT /admin/v1/tasks/{task}`: a prefix's bytes become a version of a task, the live one unless told
otherwise, or nothing changes.

Runs on the event loop; writing and proving happen in worker threads. The body is the artifact itself
(`curl -T prefix.safetensors`): multipart would be spooled to disk first and written twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.errors import ArtifactTooLarge, InvalidTaskName, PrefixStoreError, UnknownTask
from prefix_store.spec import check_task_name
from prefix_store.store import PrefixStore
from prefix_store.upload import PutResult, Upload
from server.errors import RequestError
from server.http.admin import described, etag_of, note, noted
from server.http.admin_aliases import follow_pin
from server.http.errors import BodyTooSlow
from server.http.json_body import require_identity
from server.http.json_text import json_response
from server.http.preconditions import content_sha256, if_match, if_none_match
from server.http.services import Services, services_of

STALL_SECONDS: Final = 60.0
_WRITE_BYTES: Final = 2**20
MAX_PROVING: Final = 2
"""Uploads proved at a time: each holds its whole artifact in memory meanwhile."""


async def put_task(request: Request, task: str, activate: bool = True) -> Response:
    """Uploads a version, and with `activate` makes it live: 201 for a new task, else 200."""
    services = services_of(request)
    note(request, task=task)
    try:
        existed, result = await _upload(request, services, task, activate)
    except (PrefixStoreError, RequestError):
        services.metrics.admin_operation("upload", "refused")
        raise
    services.metrics.admin_operation("upload", "created" if result.created else "unchanged")
    noted(request, result.version)
    note(request, created=result.created, activated=result.activated)
    warnings = [*result.warnings]
    if result.activated:
        warnings += await follow_pin(services, result.version)
    answer = {
        "object": "task",
        **described(result.version),
        "created": result.created,
        "activated": result.activated,
        "warnings": warnings,
    }
    return json_response(answer, 200 if existed else 201, etag_of(result.version))


async def _upload(
    request: Request, services: Services, task: str, activate: bool
) -> tuple[bool, PutResult]:
    store = services.store
    _check_name(services, task)
    _check_length(request, store.max_artifact_bytes)
    require_identity(request)
    commit = functools.partial(
        Upload.commit,
        task=task,
        activate=activate,
        if_match=if_match(request),
        if_none_match=if_none_match(request),
        expected_sha256=content_sha256(request),
    )
    async with _open_upload(store) as upload:
        await _receive(request, upload)
        async with _proving_slots(request):
            existed = _exists(store, task)
            result = await run_in_threadpool(commit, upload)
    return existed, result


def _check_name(services: Services, task: str) -> None:
    if check_task_name(task) == services.model_id:
        raise InvalidTaskName(f"task name {task!r}: that is the base model, which has no prefix")


def _check_length(request: Request, limit: int) -> None:
    """Before anything is read: a client that waits for `100 Continue` need not send it."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:19]) > limit:
        raise ArtifactTooLarge(
            f"{length[:19]} bytes; a prefix for this model has at most {limit} bytes"
        )


@contextlib.asynccontextmanager
async def _open_upload(store: PrefixStore) -> AsyncIterator[Upload]:
    upload = await run_in_threadpool(store.begin_upload)
    try:
        yield upload
    finally:
        await run_in_threadpool(upload.abort)


async def _receive(request: Request, upload: Upload) -> None:
    """Hands the body on in large pieces: each costs a change of thread."""
    pending = bytearray()
    chunks = request.stream()
    while True:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise BodyTooSlow(f"no bytes for {STALL_SECONDS:.0f} seconds") from None
        if chunk is not None:
            pending += chunk
        if len(pending) >= _WRITE_BYTES or (chunk is None and pending):
            await run_in_threadpool(upload.write, bytes(pending))
            pending.clear()
        if chunk is None:
            return


def _proving_slots(request: Request) -> asyncio.Semaphore:
    slots = request.app.state.proving_slots
    assert isinstance(slots, asyncio.Semaphore)
    return slots


def _exists(store: PrefixStore, task: str) -> bool:
    try:
        store.task(task)
    except UnknownTask:
        return False
    return True
