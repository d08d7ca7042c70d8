"""Reads a JSON body: counted, timed, parsed strictly, validated; nothing of it comes back in an error.

Runs on the event loop; called by the generation routes. FastAPI's own body parsing is not used: it has no
limit in time, answers 422 and repeats the input.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from server.errors import InvalidParameter
from server.http.errors import BodyTooLarge, BodyTooSlow, MalformedBody, UnsupportedMediaType
from server.http.preconditions import require_content_digest

M = TypeVar("M", bound=BaseModel)

BODY_SECONDS: Final = 30.0
"""uvicorn waits for ever; a client that trickles its body would hold a connection as long as it likes."""

_EXPECTED: Final = {
    "prompt": "expected a string, a list of strings, a list of token ids or a list of such lists",
    "stop": "expected a string or a list of strings",
}


async def read_object(
    request: Request, max_bytes: int, *, optional: bool = False
) -> dict[str, Any]:
    """The JSON object in the body. Raises the exceptions of `server.http.errors` that are about bodies,
    and `DigestMismatch` for one that is not what its Content-Digest says.

    `optional`: no body is an empty object.
    """
    if optional and not _has_body(request):
        return {}
    _check_headers(request, max_bytes)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _read_counted(request, max_bytes)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    require_content_digest(request, body)
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:  # says what and where, and repeats nothing of the text
        raise MalformedBody(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedBody(f"the body must be a JSON object, got {_json_type(value)}")
    return value


def validated(model: type[M], value: dict[str, Any]) -> M:
    """`value` as `model`. Raises `InvalidParameter` for the first field that does not fit."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(fault["loc"][0])
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        raise InvalidParameter(f"{where}: required", param=name)
    if name in _EXPECTED:  # a union's own faults are one per member
        raise InvalidParameter(f"{name}: {_EXPECTED[name]}", param=name)
    message = fault["msg"].removeprefix("Input should be ")
    raise InvalidParameter(f"{where}: expected {message}", param=name)


def _has_body(request: Request) -> bool:
    length = request.headers.get("content-length")
    return "transfer-encoding" in request.headers or length not in (None, "0")


def _check_headers(request: Request, max_bytes: int) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType("send Content-Type: application/json (curl --json)")
    require_identity(request)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:19]) > max_bytes:
        raise _too_large(max_bytes)


def require_identity(request: Request) -> None:
    """Raises `UnsupportedMediaType` for a compressed body: it could unfold to any size."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("send the body without a Content-Encoding")


async def _read_counted(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {max_bytes} bytes (--max-body-bytes)")


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
