"""The one line that the log has of each request: who, what, how large, how long; nothing of prompts, outputs and keys.

On the event loop; `server.http.gate` asks for the line when a request has ended, `server.http.generation` says what was
generated. Names here are all that `server.log` lets out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from starlette.requests import Request
from starlette.types import Scope

from server.types import PrefixTier, RequestTimings

_PLACE: Final = "prefixd.log"


class Target(Protocol):
    """`server.http.targets.Target`."""

    def described(self) -> dict[str, Any]: ...


class Choice(Protocol):
    """`server.http.generation.Choice`."""

    @property
    def finish_reason(self) -> str | None: ...


class Generated(Protocol):
    """`server.http.generation.Generation`."""

    @property
    def target(self) -> Target: ...
    @property
    def choices(self) -> Sequence[Choice]: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def prefix_tier(self) -> PrefixTier: ...
    @property
    def timings(self) -> RequestTimings: ...


def note_generation(request: Request, generation: Generated) -> None:
    """What this request has started: its figures are read when it has ended."""
    request.scope[_PLACE]["generation"] = generation


def note_answer(scope: Scope, num_bytes: int) -> None:
    """How large the answer's body was."""
    scope[_PLACE]["response_bytes"] = num_bytes


def request_fields(scope: Scope, route: str, status: int, seconds: float) -> dict[str, Any]:
    """The line of a request that has ended; without what it does not have."""
    noted = scope.get(_PLACE, {})
    caller = scope.get("prefixd.caller")
    length = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
    fields = {
        "tenant": getattr(caller, "tenant", None),
        "key_id": getattr(caller, "key_id", None) or None,
        "method": scope["method"],
        "route": route,
        "status": status,
        "seconds": round(seconds, 6),
        "request_bytes": int(length[:19]) if length.isdigit() else None,
        "response_bytes": noted.get("response_bytes"),
    }
    if "generation" in noted:
        fields |= _generated(noted["generation"])
    return {name: value for name, value in fields.items() if value is not None}


def _generated(generation: Generated) -> dict[str, Any]:
    described, timings = generation.target.described(), generation.timings
    return {
        "task": described["task"],
        "version": described["version"],
        "digest": described["digest"],
        "prompt_tokens": generation.num_prompt_tokens,
        "output_tokens": generation.num_output_tokens,
        "cached_tokens": generation.num_cached_tokens,
        "prefix_tier": str(generation.prefix_tier),
        "finish_reasons": [str(choice.finish_reason) for choice in generation.choices],
        "queue_seconds": timings.queue_seconds,
        "first_token_seconds": timings.first_token_seconds,
    }
