"""Puts a request that changes something into the audit log: once, before the client learns the outcome.

Runs on the event loop; the record is made durable in a worker thread. Called by `server.http.gate`. Handlers
say what it was about with `server.http.admin.note`; keys and bodies never get here.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.types import Scope

from prefix_store.audit_log import AuditLog
from prefix_store.spec import OPERATOR, full_name
from server.http.routes import task_in

UNKNOWN: Final = "unknown"
_MAX_TEXT: Final = 128


def key_id(key: str) -> str:
    """What a key is called where the key itself must not be: the beginning of its SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


class AuditEntry:
    """The record of one request. Invariant: it is written at most once."""

    def __init__(self, log: AuditLog, scope: Scope, action: str) -> None:
        self._log = log
        self._scope = scope
        self._action = action
        self._written = False
        self.error: Exception | None = None

    async def write(self, status: int | None) -> None:
        """Make the record durable; `status` None: the client went without an answer.

        Raises `StoreFull` or `StoreFailed`, also kept in `error`: then the outcome must not be told.
        """
        if self._written:
            return
        self._written = True
        try:
            await run_in_threadpool(self._log.append, **self._fields(status))
        except Exception as error:
            self.error = error
            raise

    def _fields(self, status: int | None) -> dict[str, Any]:
        client = self._scope.get("client")
        details = {
            "who": UNKNOWN,
            "source": client[0] if client else None,
            "request_id": self._scope["prefixd.request_id"],
            "action": self._action,
            "task": task_in(self._scope["path"]),
            **self._scope["prefixd.audit"],
            "status": status,
            "outcome": _outcome(status),
        }
        if details["task"] is not None:
            details["task"] = full_name(details.get("tenant", OPERATOR), details["task"])
        return {name: _short(value) for name, value in details.items() if value is not None}


def _outcome(status: int | None) -> str:
    if status is None:
        return "no answer"
    if status >= 500:
        return "failed"
    return "refused" if status >= 400 else "done"


def _short(value: Any) -> Any:
    return value[:_MAX_TEXT] if isinstance(value, str) else value
