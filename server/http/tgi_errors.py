"""Exceptions as TGI's clients read them: `{"error", "error_type"}`, in a body or in a stream.

Pure, but for the log. The type decides which exception huggingface_hub and lorax-client raise.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from starlette.responses import Response

from prefix_store.errors import PrefixStoreError, PrefixUnavailable
from server.errors import EngineOverloaded, EngineStopped, GenerationFailed, PrefixdError
from server.http.errors import NotAuthenticated, kind_of, message_of
from server.http.json_text import json_response

logger = logging.getLogger(__name__)

TGI_PATHS: Final = frozenset({"/", "/generate_stream", "/info"})
"""What nobody but TGI's clients calls; `/generate` is ours too, and there the body decides."""

_OVERLOADED: Final = 429
_UNPROCESSABLE: Final = 422
_FAILED: Final = 424


def tgi_error_object(error: Exception, request_id: str) -> dict[str, Any]:
    """The body, or the last event of a stream."""
    return {"error": message_of(error, request_id), "error_type": _kind(error)[1]}


def tgi_error_response(error: Exception, request_id: str) -> Response:
    """The whole answer."""
    status, _ = _kind(error)
    kind = kind_of(error)
    if kind.status >= 500:
        known = isinstance(error, PrefixdError | PrefixStoreError)
        logger.warning(
            "request %s: %s", request_id, type(error).__name__, exc_info=None if known else error
        )
    headers = {} if kind.retry_after is None else {"retry-after": str(kind.retry_after)}
    if kind.closes:
        headers["connection"] = "close"
    if isinstance(error, NotAuthenticated):
        headers["www-authenticate"] = 'Bearer realm="prefixd"'
    return json_response(tgi_error_object(error, request_id), status, headers)


def _kind(error: Exception) -> tuple[int, str]:
    """Status and type."""
    kind = kind_of(error)
    match error:
        case EngineOverloaded():
            return _OVERLOADED, "overloaded"
        case EngineStopped():
            return kind.status, "overloaded"
        case PrefixUnavailable():
            return kind.status, "generation"
        case GenerationFailed():
            return _FAILED, "generation"
        case NotAuthenticated():
            return kind.status, "authentication"
    if kind.status >= 500:
        return kind.status, "incomplete_generation"
    return (_UNPROCESSABLE if kind.status == 400 else kind.status), "validation"
