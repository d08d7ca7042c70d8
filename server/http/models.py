"""`GET /v1/models`: the base model and the tasks, in the words of OpenAI's model list.

Runs on the event loop: the catalog is in memory.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from prefix_store.spec import PrefixVersion
from server.http.json_text import json_response
from server.http.services import Services, services_of
from server.http.targets import find_target


async def list_models(request: Request) -> Response:
    """The base model first: load generators take the first entry for the model."""
    services = services_of(request)
    data = [_base_card(services)]
    shown = services.store.shown_name
    data += [_task_card(services, t.live, shown(t.name)) for t in services.store.tasks() if t.live]
    return json_response({"object": "list", "data": data})


async def get_model(request: Request, model_id: str) -> Response:
    """One entry; `task@v3` works here as it does in a request."""
    services = services_of(request)
    version = find_target(services, model_id, "model").version
    card = _base_card(services) if version is None else _task_card(services, version, model_id)
    return json_response(card)


def _base_card(services: Services) -> dict[str, Any]:
    return {
        "id": services.model_id,
        "object": "model",
        "created": 0,
        "owned_by": "prefixd",
        "root": services.model_id,  # vllm bench wants it
        "parent": None,
        "max_model_len": services.engine.max_model_len,
        # Prompts may be token ids: whoever makes some up must know which there are.
        "prefixd": {"vocab_size": services.store.base.vocab_size},
    }


def _task_card(services: Services, version: PrefixVersion, name: str) -> dict[str, Any]:
    num_virtual_tokens = version.manifest.num_virtual_tokens
    return {
        "id": name,
        "object": "model",
        "created": int(datetime.fromisoformat(version.created_at).timestamp()),
        "owned_by": "prefixd",
        "root": services.model_id,
        "parent": services.model_id,
        "max_model_len": services.engine.max_model_len - num_virtual_tokens,
        "prefixd": {
            "task": version.task,
            "version": version.version,
            "digest": version.digest,
            "num_virtual_tokens": num_virtual_tokens,
        },
    }
