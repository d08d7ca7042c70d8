"""`GET .../versions/{version}/content`: a stored artifact, whole or a range of it, in bounded memory.

Runs on the event loop; each piece is read in a worker thread. A whole download is hashed on the way and its
last piece is kept back until the digest is right: damaged bytes end as a broken connection, never as a file
that looks complete. A range can not be proved so; its client has `Repr-Digest` to check the whole.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from prefix_store.backends.base import BlobReader
from prefix_store.errors import PrefixUnavailable
from prefix_store.spec import PrefixVersion
from server.http.admin import etag_of
from server.http.admin_versions import find_version
from server.http.preconditions import is_unchanged
from server.http.services import services_of

PIECE_BYTES: Final = 2**20
_RANGE: Final = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


async def get_content(request: Request, task: str, version: str) -> Response:
    """200 with all bytes, 206 with one range, 304 if the client has them, 416 for a range beyond the end."""
    found = find_version(request, task, version)
    headers = {
        **etag_of(found),
        "repr-digest": _repr_digest(found),
        "accept-ranges": "bytes",
        "content-disposition": f'attachment; filename="{found.task}-v{found.version}.safetensors"',
    }
    if is_unchanged(request, headers["etag"]):
        return Response(status_code=304, headers=headers)
    content = await run_in_threadpool(services_of(request).store.open_content, found)
    if content.num_bytes != found.size_bytes:
        content.close()
        raise PrefixUnavailable("the stored artifact is damaged; upload it again")
    span = _span(request, headers["etag"], content.num_bytes)
    if span is None:
        content.close()
        headers["content-range"] = f"bytes */{content.num_bytes}"
        return Response(status_code=416, headers=headers)
    start, stop = span
    whole = stop - start == content.num_bytes
    if not whole:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{content.num_bytes}"
    return StreamingResponse(
        _pieces(content, start, stop, found.digest if whole else None),
        200 if whole else 206,
        {**headers, "content-length": str(stop - start)},
        media_type="application/octet-stream",
    )


def _span(request: Request, etag: str, num_bytes: int) -> tuple[int, int] | None:
    """The bytes asked for; everything if no single range is; None if the range is empty."""
    match = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if match is None or match[0] == "bytes=-" or request.headers.get("if-range", etag) != etag:
        return 0, num_bytes
    first, last = match[1], match[2]
    if not first:  # the last so many bytes
        start, stop = max(num_bytes - int(last), 0), num_bytes
    else:
        start = int(first)
        stop = min(int(last) + 1, num_bytes) if last else num_bytes
        if last and int(last) < start:
            return 0, num_bytes  # not a range at all
    return (start, stop) if start < stop else None


async def _pieces(
    content: BlobReader, start: int, stop: int, digest: str | None
) -> AsyncIterator[bytes]:
    """The bytes in pieces. With a `digest`, raises `PrefixUnavailable` instead of giving the last one."""
    sha = hashlib.sha256()
    try:
        while start < stop:
            size = min(PIECE_BYTES, stop - start)
            piece = await run_in_threadpool(content.read, start, size)
            start += size
            sha.update(piece)
            if len(piece) < size or (start == stop and digest not in (None, _named(sha))):
                raise PrefixUnavailable("the stored artifact is damaged; upload it again")
            yield piece
    finally:
        content.close()


def _named(sha: hashlib._Hash) -> str:
    return f"sha256:{sha.hexdigest()}"


def _repr_digest(version: PrefixVersion) -> str:
    digest = bytes.fromhex(version.digest.removeprefix("sha256:"))
    return f"sha-256=:{base64.b64encode(digest).decode()}:"
