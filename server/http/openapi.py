"""The schema of a body as OpenAPI shows it. Pure; called by `server.http.app` for each route with one."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

_DEFS: Final = "#/$defs/"


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's schema in one piece: pydantic's references would point out of the body's schema, at nothing."""
    schema = model.model_json_schema()
    defs = schema.pop("$defs", {})
    whole: dict[str, Any] = _inlined(schema, defs)
    return whole


def _inlined(value: Any, defs: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_inlined(item, defs) for item in value]
    if not isinstance(value, dict):
        return value
    reference = value.get("$ref")
    if isinstance(reference, str):
        return _inlined(defs[reference.removeprefix(_DEFS)], defs)
    return {key: _inlined(item, defs) for key, item in value.items()}
