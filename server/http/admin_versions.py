"""A task's history: its versions, and one of them. Runs on the event loop; the catalog is in memory."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from prefix_store.spec import PrefixVersion
from server.http.admin import aliases_of, described, described_versions
from server.http.json_text import json_response
from server.http.services import services_of


async def list_versions(request: Request, task: str) -> Response:
    """All versions, newest first."""
    info = services_of(request).store.task(task)
    answer = {
        "object": "list",
        "data": described_versions(info),
        "has_more": False,
        "last_id": f"v{info.versions[0].version}",
    }
    return json_response(answer)


async def get_version(request: Request, task: str, version: str) -> Response:
    """One version by number (3 or v3), alias or digest, with its manifest."""
    found = find_version(request, task, version)
    info = services_of(request).store.task(task)
    answer = {
        "object": "version",
        **described(found),
        "aliases": aliases_of(info, found),
        "manifest": found.manifest.model_dump(mode="json"),
    }
    return json_response(answer)


def find_version(request: Request, task: str, version: str) -> PrefixVersion:
    """Raises `UnknownTask`, `UnknownVersion`, `InvalidTaskName`."""
    selector = f"v{version}" if version.isdecimal() else version
    return services_of(request).store.resolve(f"{task}@{selector}")
