"""What is where, and the operator's hand on it: pin, unpin, warm, evict.

Runs on the event loop; the device tier answers through the engine, the other tiers are in memory.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.spec import PrefixVersion
from server.http.admin import described, etag_of, live_as_expected, note, noted
from server.http.json_body import read_object, validated
from server.http.json_text import json_response
from server.http.schemas import PinRequest, WarmRequest
from server.http.services import Services, services_of
from server.types import DeviceReport, prefix_ref


async def pin_task(request: Request, task: str) -> Response:
    """Keeps a task's live version resident, for `ttl_seconds` or until it is unpinned."""
    services = services_of(request)
    note(request, task=task)
    value = await read_object(request, services.max_body_bytes, optional=True)
    body = validated(PinRequest, value)
    version = _live(request, services, task)
    note(request, ttl_seconds=body.ttl_seconds)
    state = await services.engine.pin(prefix_ref(version), body.ttl_seconds)
    services.metrics.admin_operation("pin", "done")
    answer = {
        "object": "pin",
        **described(version),
        "ttl_seconds": body.ttl_seconds,
        "pinned_blocks": state.num_pinned_blocks,
        "pin_budget_blocks": state.budget_blocks,
    }
    return json_response(answer, headers=etag_of(version))


async def unpin_task(request: Request, task: str) -> Response:
    """Lets the LRU decide about a task again."""
    services = services_of(request)
    note(request, task=task)
    info = services.store.task(task)
    live_as_expected(request, info)
    services.engine.unpin(info.name)
    services.metrics.admin_operation("unpin", "done")
    return Response(status_code=204)


async def warm_task(request: Request, task: str) -> Response:
    """Begins to load a version, the live one unless another is named; 202, it is resident soon."""
    services = services_of(request)
    note(request, task=task)
    value = await read_object(request, services.max_body_bytes, optional=True)
    body = validated(WarmRequest, value)
    if body.version is None:
        version = _live(request, services, task)
    else:
        live_as_expected(request, services.store.task(task))
        version = noted(request, services.store.resolve(f"{task}@v{body.version}"))
    services.engine.warm(prefix_ref(version))
    services.metrics.admin_operation("warm", "done")
    return json_response({"object": "version", **described(version)}, 202, etag_of(version))


async def evict_task(request: Request, task: str) -> Response:
    """Frees all versions of a task on the device, once no request reads them, and in host memory."""
    services = services_of(request)
    note(request, task=task)
    info = services.store.task(task)
    live_as_expected(request, info)
    digests = sorted({version.digest for version in info.versions})
    evictable = services.store.evictable(digests)
    for digest in evictable:
        services.engine.evict(digest)
    num_dropped = sum(services.store.drop_from_host(digest) for digest in evictable)
    services.metrics.admin_operation("evict", "done")
    answer = {"object": "eviction", "task": info.name, "digests": digests, "from_host": num_dropped}
    return json_response(answer, 202)


async def get_cache(
    request: Request, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000
) -> Response:
    """The three tiers; `limit` entries of each are listed, the totals count all: of a tenant, what it owns."""
    services = services_of(request)
    device = await services.engine.device_report()
    names = {version.digest: version for t in services.store.tasks() for version in t.versions}
    if not services.store.sees_all:
        return json_response({"object": "cache", **_of_tenant(services, device, names, limit)})
    answer = {
        "object": "cache",
        "device": _device(device, limit),
        "host": _host(services, names, limit),
        "disk": _disk(services, names, limit),
    }
    return json_response(answer)


def _live(request: Request, services: Services, task: str) -> PrefixVersion:
    info = services.store.task(task)
    live_as_expected(request, info)
    return noted(request, services.store.resolve(info.name))


def _of_tenant(
    services: Services, report: DeviceReport, names: dict[str, PrefixVersion], limit: int
) -> dict[str, Any]:
    """Where a tenant's own prefixes are. Whoever has the same bytes is not told of, nor how full the tiers are."""
    resident = {r.ref.digest: r.num_blocks * report.block_bytes for r in report.residents}
    tiers = {
        "device": resident,
        "host": services.store.host_sizes(),
        "disk": {digest: version.size_bytes for digest, version in names.items()},
    }
    return {
        tier: _own_entries({d: size for d, size in sizes.items() if d in names}, names, limit)
        for tier, sizes in tiers.items()
    }


def _own_entries(
    sizes: dict[str, int], names: dict[str, PrefixVersion], limit: int
) -> dict[str, Any]:
    entries = [
        {
            "task": names[digest].task,
            "version": names[digest].version,
            "digest": digest,
            "bytes": num_bytes,
        }
        for digest, num_bytes in list(sizes.items())[::-1][:limit]
    ]
    return {"num_entries": len(sizes), "bytes": sum(sizes.values()), "entries": entries}


def _device(report: DeviceReport, limit: int) -> dict[str, Any]:
    entries = [
        {
            "task": resident.ref.task,
            "version": resident.ref.version,
            "digest": resident.ref.digest,
            "blocks": resident.num_blocks,
            "bytes": resident.num_blocks * report.block_bytes,
            "leases": resident.num_leases,
            "pinned": resident.pinned,
            "pin_seconds_left": resident.pin_seconds_left,
        }
        for resident in report.residents[-limit:]
    ]
    return {
        "num_entries": len(report.residents),
        "bytes": sum(resident.num_blocks for resident in report.residents) * report.block_bytes,
        "capacity_bytes": report.num_blocks * report.block_bytes,
        "blocks": report.num_blocks,
        "blocks_used": report.num_blocks_used,
        "pinned_blocks": report.num_pinned_blocks,
        "pin_budget_blocks": report.pin_budget_blocks,
        "entries": entries[::-1],  # the most recently used first
    }


def _host(services: Services, names: dict[str, PrefixVersion], limit: int) -> dict[str, Any]:
    stats, sizes = services.store.stats(), services.store.host_sizes()
    newest = list(sizes.items())[::-1][:limit]
    return {
        "num_entries": stats.host_entries,
        "bytes": stats.host_bytes,
        "capacity_bytes": stats.host_capacity_bytes,
        "entries": [_entry(services, names.get(d), d, num_bytes) for d, num_bytes in newest],
    }


def _disk(services: Services, names: dict[str, PrefixVersion], limit: int) -> dict[str, Any]:
    stats = services.store.stats()
    listed = list(names.values())[:limit]
    return {
        "num_entries": stats.disk_entries,
        "bytes": stats.disk_bytes,
        "entries": [_entry(services, v, v.digest, v.size_bytes) for v in listed],
    }


def _entry(
    services: Services, version: PrefixVersion | None, digest: str, num_bytes: int
) -> dict[str, Any]:
    """`version` None: of a task that was deleted, for as long as requests run with it."""
    return {
        "task": version.task if version else None,
        "version": version.version if version else None,
        "digest": digest,
        "bytes": num_bytes,
        "leases": services.store.num_holds(digest),
    }
