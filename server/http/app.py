"""Makes the FastAPI app from `Services`. Called by `server.bootstrap`, and by tests with fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.engine.intake import MAX_PROVING
from server.http import error_responses
from server.http.gate import Gate
from server.http.openapi import body_schema
from server.http.routes import OPENAPI_PATH, ROUTES, Route
from server.http.services import Lifecycle, Services
from server.http.tokenizing import TokenizerQueue

__all__ = ["Services", "create_app"]

Hook = Callable[[], Awaitable[None]]


def create_app(
    services: Services, *, on_startup: Hook | None = None, on_shutdown: Hook | None = None
) -> FastAPI:
    """The app. `on_startup` runs before the first request, `on_shutdown` after the last."""
    lifecycle = Lifecycle()
    app = FastAPI(
        title="prefixd",
        version=services.version,
        openapi_url=OPENAPI_PATH,
        docs_url=None,  # these pages load scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,  # the gate normalises; a redirect would lose a POST's body
        lifespan=_lifespan(lifecycle, on_startup, on_shutdown),
    )
    app.state.services = services
    app.state.lifecycle = lifecycle
    app.state.proving_slots = asyncio.Semaphore(MAX_PROVING)
    app.state.tokenizer_queue = TokenizerQueue()
    for route in ROUTES:
        _register(app, route)
    error_responses.install(app)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.add_middleware(Gate, services=services)
    return app


def _register(app: FastAPI, route: Route) -> None:
    extra: dict[str, Any] = {}
    if route.body is not None:
        content = {"application/json": {"schema": body_schema(route.body)}}
        extra["requestBody"] = {"required": True, "content": content}
    app.add_api_route(
        route.path,
        route.endpoint,
        methods=[route.method],
        operation_id=f"{route.method.lower()}_{route.path}",
        openapi_extra=extra,
        response_model=None,
    )


def _lifespan(
    lifecycle: Lifecycle, on_startup: Hook | None, on_shutdown: Hook | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def run(_: FastAPI) -> AsyncIterator[None]:
        if on_startup is not None:
            await on_startup()
        lifecycle.ready = True
        try:
            yield
        finally:
            lifecycle.draining = True
            if on_shutdown is not None:
                await on_shutdown()

    return run


async def _on_client_gone(_: Request, __: Exception) -> Response:
    """Nobody reads this answer; its status is for our own records."""
    return Response(status_code=499)
