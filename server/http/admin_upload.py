"""`PUT /admin/v1/tasks/{task}`: a prefix's bytes become a version of a task, the live one unless told
otherwise, or nothing changes.

Runs on the event loop; writing and proving happen in worker threads. The body is the artifact itself
(`curl -T prefix.safetensors`): multipart would be spooled to disk first and written twice.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Final

from fastapi import Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.errors import ArtifactTooLarge
from prefix_store.importers.recognition import ImportOptions
from prefix_store.upload import Upload
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
from server.http.errors import BodyTooSlow
from server.http.json_body import require_identity
from server.http.preconditions import content_sha256
from server.http.services import services_of

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
    dry_run: bool = False,
) -> Response:
    """Uploads a version, and with `activate` makes it live: 201 for a new task, else 200.

    The body is a native artifact or a bare PEFT adapter; the answer says what it was taken for and what was
    proved. `task_index`, `peft_type`: see `ImportOptions`. `rebase`: rotate the keys so that requests start
    at P. `dry_run`: all of it but the storing.
    """
    services = services_of(request)
    options = ImportOptions(peft_type, task_index, rebase)
    note(request, task=task)
    with counted(services):
        task = check_name(services, task)
        _check_length(request, services.store.max_artifact_bytes)
        require_identity(request)
        expected = content_sha256(request)
        conditions = conditions_of(request, activate)
        async with services.intake.upload() as upload:
            await _receive(request, upload)
            check_conditions(services.store, task, conditions)
            async with (
                proving_slot(request),
                services.intake.examined(upload, options, expected_sha256=expected) as examined,
            ):
                if dry_run:
                    return tried(request, task, examined)
                return await stored(request, task, examined, conditions)


def _check_length(request: Request, limit: int) -> None:
    """Before anything is read: a client that waits for `100 Continue` need not send it."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:19]) > limit:
        raise ArtifactTooLarge(
            f"{length[:19]} bytes; a prefix for this model has at most {limit} bytes"
        )


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
