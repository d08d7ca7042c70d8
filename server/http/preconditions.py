"""The request headers that make a write conditional or proved: If-Match, If-None-Match, Content-Digest.

Pure functions on the event loop; called by the admin routes. All raise `InvalidParameter` for a header
that is there and not understood: ignoring a condition would overwrite what it was to protect.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Final

from starlette.requests import Request

from prefix_store.errors import DigestMismatch, Problem
from server.errors import InvalidParameter

_ETAG: Final = re.compile(r'"(sha256:[0-9a-f]{64})"')
_SHA256: Final = re.compile(r"sha-256=:([A-Za-z0-9+/=]{44}):")


def if_match(request: Request) -> str | None:
    """The digest that must be live, `*` for any, None for no condition."""
    value = request.headers.get("if-match")
    if value is None or value.strip() == "*":
        return value and "*"
    match = _ETAG.fullmatch(value.strip())
    if match is None:
        raise InvalidParameter('If-Match: expected * or one ETag ("sha256:...")', param="If-Match")
    return match[1]


def if_none_match(request: Request) -> bool:
    """Whether the task must not exist yet."""
    value = request.headers.get("if-none-match")
    if value is not None and value.strip() != "*":
        raise InvalidParameter("If-None-Match: only * is understood", param="If-None-Match")
    return value is not None


def content_sha256(request: Request) -> str | None:
    """The hex SHA-256 that the caller announced (RFC 9530); None if there is no Content-Digest."""
    value = request.headers.get("content-digest")
    if value is None:
        return None
    for member in value.split(","):
        match = _SHA256.fullmatch(member.strip())
        if match is not None:
            return _hex(match[1])
    raise InvalidParameter(
        "Content-Digest: expected sha-256=:<base64 of 32 bytes>:", param="Content-Digest"
    )


def require_content_digest(request: Request, body: bytes) -> None:
    """Raises `DigestMismatch` unless the body is what its Content-Digest says, if it has one."""
    expected = content_sha256(request)
    got = hashlib.sha256(body).hexdigest()
    if expected not in (None, got):
        raise DigestMismatch([Problem("", f"the bytes received have the digest sha256:{got}")])


def is_unchanged(request: Request, etag: str) -> bool:
    """Whether the client has this representation already (If-None-Match on a GET)."""
    value = request.headers.get("if-none-match", "")
    members = [member.strip().removeprefix("W/") for member in value.split(",")]
    return "*" in members or etag in members


def _hex(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).hex()
    except binascii.Error:
        raise InvalidParameter("Content-Digest: not base64", param="Content-Digest") from None
