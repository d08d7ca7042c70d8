"""Exceptions to answers: OpenAI's error object, problem+json (RFC 9457) under `/admin`, TGI's where only its clients call.

Runs on the event loop; `install` gives the handlers to the app. Clients that speak OpenAI's protocol show
the message only if it is in `{"error": {"message"}}`, so no other shape may leave the other routes.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.errors import PrefixRejected, PrefixStoreError
from server.errors import DeadlineExceeded, PrefixdError
from server.http.errors import ErrorKind, NotAuthenticated, kind_of, message_of
from server.http.json_text import json_bytes
from server.http.services import request_id_of
from server.http.tgi_errors import TGI_PATHS, tgi_error_response

logger = logging.getLogger(__name__)

_ADMIN: Final = "/admin/"


def error_object(error: Exception, request_id: str) -> dict[str, Any]:
    """`{"error": {...}}` as OpenAI's clients read it, in a body or in a stream."""
    kind = kind_of(error)
    return _openai(kind, message_of(error, request_id), getattr(error, "param", None))


def error_response(error: Exception, path: str, request_id: str) -> Response:
    """The whole answer for `error`, in the shape that belongs to `path`."""
    if path in TGI_PATHS:
        return tgi_error_response(error, request_id)
    kind = kind_of(error)
    message = message_of(error, request_id)
    headers = {} if kind.retry_after is None else {"retry-after": str(kind.retry_after)}
    if kind.closes:
        headers["connection"] = "close"
    if isinstance(error, NotAuthenticated):
        headers["www-authenticate"] = 'Bearer realm="prefixd"'
    if isinstance(error, DeadlineExceeded):
        headers["x-should-retry"] = (
            "false"  # OpenAI's clients would ask twice more of a server that is busy
        )
    if not path.startswith(_ADMIN):
        body = _openai(kind, message, getattr(error, "param", None))
        return _json(body, kind.status, headers, "application/json")
    faults = error.problems if isinstance(error, PrefixRejected) else ()
    problem = _problem(kind, message, request_id)
    if faults:
        problem["errors"] = [{"pointer": f.pointer, "detail": f.detail} for f in faults]
    return _json(problem, kind.status, headers, "application/problem+json")


def install(app: FastAPI) -> None:
    """Replaces FastAPI's own handlers, whose `{"detail"}` clients do not show."""
    for cls in (PrefixdError, PrefixStoreError):
        app.add_exception_handler(cls, _on_domain_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


async def _on_domain_error(request: Request, error: Exception) -> Response:
    if kind_of(error).status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.warning("request %s: %s: %s", request_id_of(request), type(error).__name__, error)
    return error_response(error, request.scope["path"], request_id_of(request))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals; 405 is the one that routes can cause."""
    assert isinstance(error, HTTPException)
    path, request_id = request.scope["path"], request_id_of(request)
    phrase = HTTPStatus(error.status_code).phrase
    kind = ErrorKind(error.status_code, "invalid_request_error", phrase.lower().replace(" ", "_"))
    message = f"{request.method} {path[:200]}: {phrase}"
    headers = dict(error.headers or {})
    if path.startswith(_ADMIN):
        problem = _problem(kind, message, request_id)
        return _json(problem, kind.status, headers, "application/problem+json")
    if path in TGI_PATHS:
        body = {"error": message, "error_type": "validation"}
        return _json(body, kind.status, headers, "application/json")
    return _json(_openai(kind, message, None), kind.status, headers, "application/json")


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """A query parameter that is no number or out of its range; bodies are read by `json_body`."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    name = str(fault["loc"][-1])
    kind = ErrorKind(400, "invalid_request_error", "invalid_parameter")
    message = f"{name}: {fault['msg']}"
    path, request_id = request.scope["path"], request_id_of(request)
    if path.startswith(_ADMIN):
        problem = _problem(kind, message, request_id)
        return _json(problem, kind.status, {}, "application/problem+json")
    return _json(_openai(kind, message, name), kind.status, {}, "application/json")


def _openai(kind: ErrorKind, message: str, param: str | None) -> dict[str, Any]:
    return {
        "error": {"message": message, "type": kind.type, "param": param, "code": kind.code},
    }


def _problem(kind: ErrorKind, message: str, request_id: str) -> dict[str, Any]:
    return {
        "type": f"urn:prefixd:error:{kind.code}",
        "title": HTTPStatus(kind.status).phrase,
        "status": kind.status,
        "detail": message,
        "code": kind.code,
        "request_id": request_id,
    }


def _json(body: dict[str, Any], status: int, headers: dict[str, str], media: str) -> Response:
    return Response(json_bytes(body), status, headers, media_type=media)
