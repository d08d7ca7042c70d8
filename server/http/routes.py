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
from server.http.admin_compile import CompileRequest, compile_task
from server.http.admin_upload import put_task
from server.http.completions import create_completion
from server.http.generate import generate
from server.http.models import get_model, list_models
from server.http.ops import healthz, metrics, readyz
from server.http.schemas import CompletionRequest, GenerateRequest

Endpoint = Callable[..., Coroutine[Any, Any, Response]]
OPENAPI_PATH: Final = "/openapi.json"


class Scope(StrEnum):
    """Which key a route asks for. The admin key opens all of them."""

    PUBLIC = "public"
    INFER = "infer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. `body`: the schema that the documentation shows."""

    method: str
    path: str
    endpoint: Endpoint
    scope: Scope
    body: type[Any] | None = None


ROUTES: Final = (
    Route("POST", "/generate", generate, Scope.INFER, GenerateRequest),
    Route("POST", "/v1/completions", create_completion, Scope.INFER, CompletionRequest),
    Route("GET", "/v1/models", list_models, Scope.INFER),
    Route("GET", "/v1/models/{model_id:path}", get_model, Scope.INFER),
    Route("GET", "/admin/v1/tasks", list_tasks, Scope.ADMIN),
    Route("GET", "/admin/v1/tasks/{task}", get_task, Scope.ADMIN),
    Route("PUT", "/admin/v1/tasks/{task}", put_task, Scope.ADMIN),
    Route("DELETE", "/admin/v1/tasks/{task}", delete_task, Scope.ADMIN),
    Route("POST", "/admin/v1/tasks/{task}/compile", compile_task, Scope.ADMIN, CompileRequest),
    Route("GET", "/metrics", metrics, Scope.INFER),
    Route("GET", "/healthz", healthz, Scope.PUBLIC),
    Route("GET", "/health", healthz, Scope.PUBLIC),
    Route("GET", "/readyz", readyz, Scope.PUBLIC),
)

SCOPES: Final[dict[str, Scope]] = {
    **{route.path: route.scope for route in ROUTES},
    OPENAPI_PATH: Scope.INFER,  # FastAPI's own
}
_PATTERNS: Final[list[tuple[re.Pattern[str], str]]] = [
    (compile_path(path)[0], path) for path in SCOPES
]


def template_of(path: str) -> str | None:
    """The route that serves `path`, by the same patterns as the router's; None if there is none."""
    return next((template for pattern, template in _PATTERNS if pattern.match(path)), None)
