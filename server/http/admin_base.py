"""`GET /admin/v1/base`: the resident model as a prefix must fit it, for whoever makes prefixes away from the server.

Runs on the event loop: all of it is in memory.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from prefix_store.spec import LayerLayout
from server.http.json_text import json_response
from server.http.services import services_of


async def get_base(request: Request) -> Response:
    """Shapes, number format, positions and fingerprints: what an artifact's tensors and manifest must say."""
    services = services_of(request)
    base = services.store.base
    answer = {
        "object": "base",
        "id": services.model_id,
        "model_type": base.model_type,
        "dtype": base.layout.dtype,
        "vocab_size": base.vocab_size,
        "position_scheme": base.position_scheme,
        "rope_theta": base.rope_theta,
        "max_model_len": services.engine.max_model_len,
        "max_num_virtual_tokens": services.store.limits.max_num_virtual_tokens,
        "bytes_per_token": base.layout.bytes_per_token,
        "layers": [_layer(layer) for layer in base.layout.layers],
        "base_model": base.as_ref().model_dump(exclude_none=True),
    }
    return json_response(answer)


def _layer(layer: LayerLayout) -> dict[str, Any]:
    return {
        "num_kv_heads": layer.num_kv_heads,
        "key_dim": layer.key_dim,
        "value_dim": layer.value_dim,
        "window": layer.window,
    }
