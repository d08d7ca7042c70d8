"""Every route with the key it needs: one table, so that a route without a rule can not exist.

`server.http.app` registers these with FastAPI; `server.http.gate` looks a path up here before the app sees
it, and answers 404 itself for a path that no row matches. So what is not written here is closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from starlette.responses import Response
from starlette.routing import compile_path

from server.http.admin import delete_task, get_task, list_tasks
from server.http.admin_aliases import delete_canary, get_alias, put_alias, roll_back
from server.http.admin_base import get_base
from server.http.admin_cache import evict_task, get_cache, pin_task, unpin_task, warm_task
from server.http.admin_compile import CompileRequest, compile_task
from server.http.admin_content import get_content
from server.http.admin_grants import delete_grant, put_grant
from server.http.admin_keys import (
    KeyRequest,
    RotateRequest,
    create_key,
    list_keys,
    revoke_key,
    rotate_key,
)
from server.http.admin_upload import put_task
from server.http.admin_versions import get_version, list_versions
from server.http.chat import create_chat_completion
from server.http.chat_schemas import ChatRequest
from server.http.completions import create_completion
from server.http.generate import generate
from server.http.models import get_model, list_models
from server.http.ops import healthz, metrics, readyz
from server.http.schemas import (
    AliasRequest,
    CompletionRequest,
    GenerateRequest,
    PinRequest,
    WarmRequest,
)
from server.http.tgi import generate_at_root, generate_stream, info
from server.http.tgi_schemas import TgiRequest
from server.http.tokenize import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
    tokenizer_info,
)

Endpoint = Callable[..., Coroutine[Any, Any, Response]]
OPENAPI_PATH: Final = "/openapi.json"


class Scope(StrEnum):
    """Which key a route asks for. OPERATOR: one for administration that belongs to no tenant; it opens all of them."""

    PUBLIC = "public"
    INFER = "infer"
    ADMIN = "admin"
    METRICS = "metrics"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. `body`: the schema that the documentation shows.

    `action`: what it changes, for the audit log; every answer of such a route is recorded, refusals too.
    """

    method: str
    path: str
    endpoint: Endpoint
    scope: Scope
    body: type[Any] | None = None
    action: str | None = None


_TASK: Final = "/admin/v1/tasks/{task}"
_GRANT: Final = f"{_TASK}/grants/{{tenant}}"
_KEYS: Final = "/admin/v1/keys"
_KEY: Final = f"{_KEYS}/{{key_id}}"
_CONTENT: Final = f"{_TASK}/versions/{{version}}/content"

ROUTES: Final = (
    Route("POST", "/generate", generate, Scope.INFER, GenerateRequest),
    Route("POST", "/generate_stream", generate_stream, Scope.INFER, TgiRequest),
    Route("POST", "/", generate_at_root, Scope.INFER, TgiRequest),
    Route("GET", "/info", info, Scope.INFER),
    Route("POST", "/v1/completions", create_completion, Scope.INFER, CompletionRequest),
    Route("POST", "/v1/chat/completions", create_chat_completion, Scope.INFER, ChatRequest),
    Route("GET", "/v1/models", list_models, Scope.INFER),
    Route("GET", "/v1/models/{model_id:path}", get_model, Scope.INFER),
    Route("POST", "/tokenize", tokenize, Scope.INFER, TokenizeRequest),
    Route("POST", "/detokenize", detokenize, Scope.INFER, DetokenizeRequest),
    Route("GET", "/tokenizer_info", tokenizer_info, Scope.INFER),
    Route("GET", "/admin/v1/tasks", list_tasks, Scope.ADMIN),
    Route("GET", _TASK, get_task, Scope.ADMIN),
    Route("PUT", _TASK, put_task, Scope.ADMIN, action="upload"),
    Route("POST", f"{_TASK}/compile", compile_task, Scope.ADMIN, CompileRequest, "compile"),
    Route("DELETE", _TASK, delete_task, Scope.ADMIN, action="delete"),
    Route("GET", f"{_TASK}/versions", list_versions, Scope.ADMIN),
    Route("GET", f"{_TASK}/versions/{{version}}", get_version, Scope.ADMIN),
    Route("GET", _CONTENT, get_content, Scope.ADMIN),
    Route("GET", f"{_TASK}/aliases/{{alias}}", get_alias, Scope.ADMIN),
    Route("PUT", f"{_TASK}/aliases/{{alias}}", put_alias, Scope.ADMIN, AliasRequest, "alias"),
    Route("DELETE", f"{_TASK}/aliases/{{alias}}", delete_canary, Scope.ADMIN, action="end_canary"),
    Route("POST", f"{_TASK}/rollback", roll_back, Scope.ADMIN, action="rollback"),
    Route("PUT", _GRANT, put_grant, Scope.ADMIN, action="grant"),
    Route("DELETE", _GRANT, delete_grant, Scope.ADMIN, action="end_grant"),
    # A pin takes its blocks from all tenants.
    Route("POST", f"{_TASK}/pin", pin_task, Scope.OPERATOR, PinRequest, "pin"),
    Route("POST", f"{_TASK}/unpin", unpin_task, Scope.OPERATOR, action="unpin"),
    Route("POST", f"{_TASK}/warm", warm_task, Scope.ADMIN, WarmRequest, "warm"),
    Route("POST", f"{_TASK}/evict", evict_task, Scope.ADMIN, action="evict"),
    Route("GET", "/admin/v1/cache", get_cache, Scope.ADMIN),
    Route("GET", "/admin/v1/base", get_base, Scope.ADMIN),
    Route("POST", _KEYS, create_key, Scope.OPERATOR, KeyRequest, "create_key"),
    Route("GET", _KEYS, list_keys, Scope.OPERATOR),
    Route("POST", f"{_KEY}/rotate", rotate_key, Scope.OPERATOR, RotateRequest, "rotate_key"),
    Route("DELETE", _KEY, revoke_key, Scope.OPERATOR, action="revoke_key"),
    Route("GET", "/metrics", metrics, Scope.METRICS),
    Route("GET", "/healthz", healthz, Scope.PUBLIC),
    Route("GET", "/health", healthz, Scope.PUBLIC),
    Route("GET", "/ping", healthz, Scope.PUBLIC),
    Route("GET", "/readyz", readyz, Scope.PUBLIC),
)

SCOPES: Final[dict[str, Scope]] = {
    **{route.path: route.scope for route in ROUTES},
    OPENAPI_PATH: Scope.INFER,  # FastAPI's own
}
ACTIONS: Final = {(route.method, route.path): route.action for route in ROUTES if route.action}
_PATTERNS: Final[list[tuple[re.Pattern[str], str]]] = [
    (compile_path(path)[0], path) for path in SCOPES
]


def template_of(path: str) -> str | None:
    """The route that serves `path`, by the same patterns as the router's; None if there is none."""
    return next((template for pattern, template in _PATTERNS if pattern.match(path)), None)


def task_in(path: str) -> str | None:
    """The task that a path is about, if its route has one."""
    found = next((match for pattern, _ in _PATTERNS if (match := pattern.match(path))), None)
    return found.groupdict().get("task") if found else None
