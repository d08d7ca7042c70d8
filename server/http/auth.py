"""Who a request comes from, and whether its route opens to that. On the event loop; called by `server.http.gate`.

A key is compared by its SHA-256, in constant time, with those of the environment and with the one stored key that has
its id: what a wrong key costs does not depend on how many keys there are, nor on how wrong it is.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final
from urllib.parse import unquote_plus, unquote_to_bytes

from starlette.datastructures import Headers

from prefix_store.keys import KeyScope, KeyState, hash_of, id_in, is_key
from prefix_store.spec import OPERATOR
from server.http.audit import key_id
from server.http.caller import Caller
from server.http.errors import KeyInUrl, NotAuthenticated, NotPermitted
from server.http.routes import Scope
from server.http.services import Services

_NO_HASH: Final = hash_of("")  # compared with when no stored key has the id
_EVERYTHING: Final = frozenset(KeyScope)
_CLIENT: Final = frozenset({KeyScope.INFER, KeyScope.METRICS})
_NEEDED: Final = {
    Scope.INFER: KeyScope.INFER,
    Scope.ADMIN: KeyScope.ADMIN,
    Scope.OPERATOR: KeyScope.ADMIN,
    Scope.METRICS: KeyScope.METRICS,
}
ANYONE: Final = Caller("", OPERATOR, _CLIENT)
"""Without a key, where inference is open."""

_KEY_LIKE: Final = re.compile(rb"pfx_[0-9a-z]{1,16}_[A-Za-z0-9_-]{16}")
_MAX_PARAMETERS: Final = 64
_KEY_PARAMETERS: Final = frozenset(
    {
        "access_token",
        "admin_key",
        "api_key",
        "apikey",
        "auth",
        "authorization",
        "bearer",
        "key",
        "token",
    }
)


def authenticate(services: Services, scope: Scope, headers: Headers) -> Caller:
    """Who asks for a route of `scope`. Raises `NotAuthenticated` without a key that is one.

    While there are no keys for it, inference is open, to whatever is sent: clients send some key always.
    """
    if services.keys is not None:
        services.keys.refresh()
    try:
        return _by_key(services, headers)
    except _Unknown as unknown:
        if _NEEDED[scope] in _CLIENT and _is_open(services):
            return ANYONE
        services.metrics.auth_failure(unknown.reason)
        raise NotAuthenticated(str(unknown)) from None


def require(services: Services, caller: Caller, scope: Scope) -> None:
    """Raises `NotPermitted` unless the caller's key opens routes of `scope`."""
    allowed = _NEEDED[scope] in caller.scopes
    if allowed and (scope is not Scope.OPERATOR or caller.is_operator):
        return
    services.metrics.auth_failure("scope")
    needed = "an operator's key" if scope is Scope.OPERATOR else f"the scope {_NEEDED[scope]}"
    raise NotPermitted(f"the key does not open this route, which needs {needed}")


def refuse_keys_in_url(path: str, query: bytes) -> None:
    """Raises `KeyInUrl` for a key where proxies and histories keep it. `path`: decoded; `query`: as it came."""
    if "pfx_" in path and _KEY_LIKE.search(path.encode()):
        raise KeyInUrl("the path holds what looks like a key")
    if not query:
        return
    if _KEY_LIKE.search(unquote_to_bytes(query)):
        raise KeyInUrl("the query holds what looks like a key")
    for pair in query.split(b"&", _MAX_PARAMETERS)[:_MAX_PARAMETERS]:
        name = unquote_plus(pair.partition(b"=")[0].decode("latin-1")).lower()
        if name.replace("-", "_") in _KEY_PARAMETERS:
            raise KeyInUrl(f"the query has the parameter {name}")


class _Unknown(Exception):
    """There is no caller; `reason` is for the metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _by_key(services: Services, headers: Headers) -> Caller:
    text = _bearer(headers)
    given = hash_of(text)
    # All are compared, always: the time tells nothing about which of them is close.
    found = [
        Caller(key_id(key), OPERATOR, scopes)
        for key, scopes in ((services.admin_key, _EVERYTHING), (services.api_key, _CLIENT))
        if key is not None and is_key(given, hash_of(key))
    ]
    stored = services.keys.find(id_in(text) or "") if services.keys else None
    fits = is_key(given, stored.sha256 if stored else _NO_HASH)
    if found:
        return found[0]
    if stored is None or not fits:
        raise _Unknown("wrong", "the key is not one of this server")
    state = stored.state(datetime.now(UTC))
    if state is not KeyState.ACTIVE:
        raise _Unknown(state.value, f"the key {stored.id} is {state}")
    return Caller(stored.id, stored.tenant, stored.scopes)


def _bearer(headers: Headers) -> str:
    """The key in the request's one Authorization header."""
    values = headers.getlist("authorization")
    if not values:
        raise _Unknown("missing", "this route needs a key: send Authorization: Bearer <key>")
    if len(values) > 1:  # a proxy may have judged another one than we would
        raise _Unknown("malformed", "expected one Authorization header, got several")
    scheme, _, key = values[0].partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise _Unknown("malformed", "expected Authorization: Bearer <key>")
    return key.strip()


def _is_open(services: Services) -> bool:
    """Once a key was made, also if it ended since, nobody comes in without one."""
    return services.api_key is None and not (services.keys and services.keys.any_made)
