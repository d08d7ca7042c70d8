"""Whether a request carries the key that its route asks for. Pure functions; called by `server.http.gate`."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers

from server.http.errors import NotAuthenticated
from server.http.routes import Scope
from server.http.services import Services


def authorise(services: Services, scope: Scope, headers: Headers) -> None:
    """Raises `NotAuthenticated` unless a key that opens `scope` was sent, or none is needed."""
    if scope is Scope.PUBLIC or (scope is Scope.INFER and services.api_key is None):
        return
    keys = [services.admin_key] + ([services.api_key] if scope is Scope.INFER else [])
    given = _bearer(headers)
    if given is None:
        services.metrics.auth_failure("missing")
        raise NotAuthenticated("this route needs a key: send Authorization: Bearer <key>")
    # All keys are compared, always: the time tells nothing about which of them is close.
    fits = [_same(given, key) for key in keys if key is not None]
    if True not in fits:
        services.metrics.auth_failure("wrong")
        raise NotAuthenticated("the key does not open this route")


def _bearer(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _same(given: str, key: str) -> bool:
    digests = [hashlib.sha256(text.encode()).digest() for text in (given, key)]
    return hmac.compare_digest(*digests)
