"""Reading manifests: JSON text to `PrefixManifest`, with nothing forgiven and every fault named.

Pure functions on any thread; called by `header`.
"""

from __future__ import annotations

from typing import Final

from pydantic import JsonValue, ValidationError

from prefix_store import strict_json
from prefix_store.errors import MalformedArtifact, Problem
from prefix_store.spec import PrefixManifest

MAX_NESTING: Final = 8


def parse_object(text: str, what: str) -> dict[str, JsonValue]:
    """The JSON object in `text`, read strictly; `what` it is ("header"), for `MalformedArtifact`."""
    pointer = f"/{what}"
    try:
        value = strict_json.parse(text, max_depth=MAX_NESTING)
    except ValueError as error:
        raise MalformedArtifact.at(pointer, f"the {what} is not acceptable JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedArtifact.at(pointer, f"the {what} is not a JSON object")
    return value


def parse_manifest(text: str) -> PrefixManifest:
    """The manifest in `text`. Raises `MalformedArtifact` with every faulty field."""
    fields = parse_object(text, "manifest")
    if type(fields.get("format_version")) is not int:  # a bool would pass as the number 1
        raise MalformedArtifact.at(
            "/manifest/format_version", "manifest field format_version: expected an integer"
        )
    try:
        return PrefixManifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [_field_problem(fault["loc"], fault["msg"]) for fault in faults]
        raise MalformedArtifact(problems) from None


def _field_problem(location: tuple[int | str, ...], message: str) -> Problem:
    parts = [str(part)[:64] for part in location]
    detail = f"manifest field {'.'.join(parts)}: {message}"
    return Problem(f"/manifest/{'/'.join(parts)}", detail)
