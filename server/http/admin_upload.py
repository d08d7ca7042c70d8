"""`PUT /admin/v1/tasks/{task}`: a prefix's bytes become a version of a task, the live one unless told
otherwise, or nothing changes.

Runs on the event loop; writing and proving happen in worker threads. The body is the artifact itself
(`curl -T prefix.safetensors`): multipart would be spooled to disk first and written twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.errors import ArtifactTooLarge
from prefix_store.importers.recognition import ImportOptions, Recognition, recognition_of
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.store import PrefixStore
from prefix_store.upload import PutResult, Upload
from server.http.admin import note
from server.http.admin_write import (
    Conditions,
    check_name,
    counted,
    exists,
    proving_slot,
    stored,
)
from server.http.errors import BodyTooSlow
from server.http.json_body import require_identity
from server.http.preconditions import content_sha256, if_match, if_none_match
from server.http.services import Services, services_of

STALL_SECONDS: Final = 60.0
MIN_BYTES_PER_SECOND: Final = 64 * 1024
"""On the whole, once the first `STALL_SECONDS` are over: a body that drips would hold its file for days."""
_WRITE_BYTES: Final = 2**20


async def put_task(
    request: Request,
    task: str,
    task_index: Annotated[int | None, Query(ge=0, le=1_000_000)] = None,
    peft_type: Annotated[str | None, Query(max_length=64)] = None,
    rebase: bool = False,
    activate: bool = True,
) -> Response:
    """Uploads a version, and with `activate` makes it live: 201 for a new task, else 200.

    The body is a native artifact or a bare PEFT adapter; the answer says what it was taken for.
    `task_index`, `peft_type`: see `ImportOptions`. `rebase`: rotate the keys so that requests start at P.
    """
    services = services_of(request)
    options = ImportOptions(peft_type, task_index, rebase)
    note(request, task=task)
    with counted(services):
        check_name(services, task)
        _check_length(request, services.store.max_artifact_bytes)
        require_identity(request)
        existed, result, found = await _upload(request, services, task, options, activate)
    return await stored(request, existed, result, found)


async def _upload(
    request: Request, services: Services, task: str, options: ImportOptions, activate: bool
) -> tuple[bool, PutResult, Recognition]:
    expected = content_sha256(request)
    conditions: Conditions = {
        "activate": activate,
        "if_match": if_match(request),
        "if_none_match": if_none_match(request),
    }
    async with _open_upload(services.store) as upload:
        await _receive(request, upload)
        async with proving_slot(request):
            existed = exists(services.store, task)
            translate = functools.partial(upload.translate, options, expected_sha256=expected)
            incoming = await run_in_threadpool(translate)
            if incoming is None:
                commit = functools.partial(
                    upload.commit, task, expected_sha256=expected, **conditions
                )
                result = await run_in_threadpool(commit)
                return existed, result, recognition_of(result.version.manifest)
            content = incoming.content
            if isinstance(content, SoftPrompt):
                content = await services.compiler.bake(content)
            put = functools.partial(services.store.put, task, content, **conditions)
            return existed, await run_in_threadpool(put), incoming.recognition


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
    """Hands the body on in large pieces: each costs a change of thread. Only the client's time is counted."""
    pending = bytearray()
    chunks = request.stream()
    waited, num_bytes = 0.0, 0
    while True:
        patience = STALL_SECONDS + num_bytes / MIN_BYTES_PER_SECOND - waited
        started = time.monotonic()
        try:
            async with asyncio.timeout(min(patience, STALL_SECONDS)):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise BodyTooSlow(
                f"{num_bytes} bytes came; expected some within {STALL_SECONDS:.0f} seconds, and then "
                f"{MIN_BYTES_PER_SECOND} each second on the whole"
            ) from None
        waited += time.monotonic() - started
        if chunk is not None:
            num_bytes += len(chunk)
            pending += chunk
        if len(pending) >= _WRITE_BYTES or (chunk is None and pending):
            await run_in_threadpool(upload.write, bytes(pending))
            pending.clear()
        if chunk is None:
            return
