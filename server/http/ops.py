"""Probes and metrics. Runs on the event loop, except for the rendering of metrics.

`/healthz` says whether a restart would help, `/readyz` whether requests should come here. Both give reasons.
"""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from server.http.json_text import json_response
from server.http.services import Lifecycle, Services, lifecycle_of, services_of


async def healthz(request: Request) -> Response:
    """200 while the engine thread lives and moves."""
    services = services_of(request)
    return _probe(_engine_faults(services, lifecycle_of(request)), services)


async def readyz(request: Request) -> Response:
    """200 while new requests are welcome."""
    services = services_of(request)
    return _probe(_readiness_faults(services, lifecycle_of(request)), services)


async def metrics(request: Request) -> Response:
    """Prometheus or OpenMetrics text."""
    services = services_of(request)
    services.metrics.set_ready(not _readiness_faults(services, lifecycle_of(request)))
    accept = request.headers.get("accept", "")[:1024]
    body, content_type = await run_in_threadpool(_render, services, accept)
    return Response(body, headers={"content-type": content_type})


def _render(services: Services, accept: str) -> tuple[bytes, str]:
    return services.metrics.render(accept, services.store.stats())


def _readiness_faults(services: Services, lifecycle: Lifecycle) -> list[str]:
    reasons = _engine_faults(services, lifecycle)
    if lifecycle.draining:
        reasons.append("the server is shutting down")
    elif not lifecycle.ready:
        reasons.append("the server is starting")
    return reasons


def _engine_faults(services: Services, lifecycle: Lifecycle) -> list[str]:
    if lifecycle.fault is not None:
        return [lifecycle.fault]
    status = services.engine.status()
    if not status.alive:
        return ["the engine thread does not run"]
    if status.heartbeat_age_seconds > services.hang_seconds:
        return [f"the engine has not moved for {status.heartbeat_age_seconds:.0f} seconds"]
    return []


def _probe(reasons: list[str], services: Services) -> Response:
    status = services.engine.status()
    answer = {
        "status": "unavailable" if reasons else "ok",
        "reasons": reasons,
        "requests_running": status.num_running,
        "requests_waiting": status.num_waiting,
        "version": services.version,
    }
    return json_response(answer, 503 if reasons else 200)
