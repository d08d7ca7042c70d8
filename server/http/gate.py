"""The outermost layer of the app: path, request id, key, the last catch, the record of what was answered.

Plain ASGI, on the event loop. Nothing that comes from a client chooses an id or a metric label.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import replace
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefix_store.errors import PrefixStoreError
from prefix_store.spec import OPERATOR
from server.errors import PrefixdError
from server.http.audit import AuditEntry
from server.http.auth import authenticate, refuse_keys_in_url, require
from server.http.caller import NOBODY, Caller, put_caller
from server.http.error_responses import error_response
from server.http.errors import KeyInUrl, NoSuchRoute
from server.http.request_log import note_answer, request_fields
from server.http.routes import ACTIONS, SCOPES, template_of
from server.http.routes import Scope as AccessScope
from server.http.services import Services

logger = logging.getLogger(__name__)

_SLASHES: Final = re.compile(r"/{2,}")
_METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
_MAX_CLIENT_ID: Final = 128


class Gate:
    """Wraps the app; see the module's text."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        # Before anything looks at it: the rule must judge the path that the router will see.
        path = normalised(scope["path"])
        request_id = uuid.uuid4().hex
        noted: dict[str, object] = {}
        scope = {**scope, "path": path, "prefixd.request_id": request_id, "prefixd.audit": noted}
        scope |= {"prefixd.arrived": started, "prefixd.log": {}}
        template = template_of(path)
        entry = self._audit_entry(scope, template)
        answer = _Answer(send, request_id, Headers(scope=scope), entry)
        try:
            await self._admit(scope, template)
            await self._app(scope, receive, answer.send)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not leave as plain text
            await self._fail(error, scope, receive, answer)
        finally:
            await answer.finish()
            seconds = time.monotonic() - started
            note_answer(scope, answer.num_bytes)
            self._record(scope, template, answer.status, seconds)

    async def _admit(self, scope: Scope, template: str | None) -> None:
        try:
            refuse_keys_in_url(scope["path"], scope.get("query_string", b""))
        except KeyInUrl:
            scope["prefixd.audit"]["task"] = None  # it may be the key; the record is for years
            raise
        if template is None:
            raise NoSuchRoute(f"nothing is served at {scope['path'][:200]}")
        access = SCOPES[template]
        caller = NOBODY
        if access is not AccessScope.PUBLIC:
            caller = authenticate(self._services, access, Headers(scope=scope))
            if caller.key_id:
                scope["prefixd.audit"]["who"] = caller.key_id
            if caller.tenant != OPERATOR:
                scope["prefixd.audit"]["tenant"] = caller.tenant
            require(self._services, caller, access)
        put_caller(scope, caller)
        scope["prefixd.services"] = self._services_for(caller, access)

    def _services_for(self, caller: Caller, access: AccessScope) -> Services:
        """What the handler may reach. Only for inference does a tenant see what others have granted to it."""
        tenant = None if caller.is_operator else caller.tenant
        view = self._services.store.seen_by(tenant, granted=access is AccessScope.INFER)
        return replace(self._services, store=view)

    def _audit_entry(self, scope: Scope, template: str | None) -> AuditEntry | None:
        action = ACTIONS.get((scope["method"], template or ""))
        if action is None or self._services.audit is None:
            return None
        return AuditEntry(self._services.audit, scope, action)

    async def _fail(
        self, error: Exception, scope: Scope, receive: Receive, answer: _Answer
    ) -> None:
        request_id = scope["prefixd.request_id"]
        error = answer.audit_error or error  # what came after is only its echo
        if not isinstance(error, PrefixdError | PrefixStoreError):
            logger.error("request %s failed", request_id, exc_info=error)
        if answer.status is None:
            response = error_response(error, scope["path"], request_id)
            await response(scope, receive, answer.send)

    def _record(
        self, scope: Scope, template: str | None, status: int | None, seconds: float
    ) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        shown = status or 499  # no answer was begun: the client had gone
        self._services.metrics.http_request(method, template or "unmatched", shown, seconds)
        probe = template is not None and SCOPES[template] is AccessScope.PUBLIC
        logger.log(
            logging.DEBUG if probe or template == "/metrics" else logging.INFO,
            "%s %s %d in %.1f ms",
            method,
            template or "unmatched",
            shown,
            seconds * 1e3,
            extra={
                "request_id": scope["prefixd.request_id"],
                "request": request_fields(
                    {**scope, "method": method}, template or "unmatched", shown, seconds
                ),
            },
        )


class _Answer:
    """Puts our headers on the answer, remembers its status, and has it recorded before it leaves."""

    def __init__(
        self, send: Send, request_id: str, request_headers: Headers, entry: AuditEntry | None
    ) -> None:
        self._send = send
        self._entry = entry
        self._ids = {"x-request-id": request_id}
        echoed = client_id(request_headers.get("x-request-id", ""))
        if echoed:
            self._ids["x-client-request-id"] = echoed
        self.status: int | None = None
        self.num_bytes = 0

    async def send(self, message: Message) -> None:
        """ASGI's `send`."""
        if message["type"] == "http.response.start":
            if self._entry is not None:
                await self._entry.write(message["status"])
            self.status = message["status"]
            MutableHeaders(scope=message).update(self._ids)
        self.num_bytes += len(message.get("body", b""))
        await self._send(message)

    @property
    def audit_error(self) -> Exception | None:
        """Why the audit log could not take the record, if it could not."""
        return self._entry.error if self._entry else None

    async def finish(self) -> None:
        """Records a request that got no answer: what it changed may have been changed."""
        if self._entry is None or self.status is not None:
            return
        try:
            await self._entry.write(None)
        except PrefixStoreError:
            logger.exception("the audit log has no record of an admin request")


def normalised(path: str) -> str:
    """`//v1//models/` -> `/v1/models`: clients join base URLs carelessly, and redirects lose POST bodies."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"


def client_id(text: str) -> str:
    """A client's own id, fit to be echoed: printable ASCII, not longer than a reasonable id."""
    return "".join(char for char in text[:_MAX_CLIENT_ID] if " " < char <= "~")
