"""How we write JSON: ASCII only, no NaN.

ASCII, because line-based SSE readers split at U+2028 and U+0085, which JSON may hold raw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

# Made once: `json.dumps` makes an encoder per call, and this runs once per token.
_ENCODER: Final = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def json_bytes(value: Any) -> bytes:
    """`value` as compact ASCII JSON."""
    return _ENCODER.encode(value).encode("ascii")


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An `application/json` answer."""
    return Response(json_bytes(value), status, headers, media_type="application/json")
