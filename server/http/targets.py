"""From the name in a request to the prefix that answers it, and to the sampling values that apply.

Runs on the event loop: the catalog is in memory. Called by `server.http.generation`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request

from prefix_store.canary import takes_canary
from prefix_store.catalog import CANARY, LIVE
from prefix_store.errors import InvalidTaskName, UnknownTask, UnknownVersion
from prefix_store.spec import GenerationDefaults, PrefixVersion
from server.errors import InvalidParameter, ModelNotFound
from server.http.schemas import SamplingFields
from server.http.services import Services, request_id_of
from server.types import MAX_TOKENS, PrefixRef, SamplingParams, prefix_ref

SESSION_HEADER: Final = "x-session-id"
# Taken as they are; the others need a word of their own.
_SAMPLING_NAMES: Final = tuple(
    spec.name
    for spec in dataclasses.fields(SamplingParams)
    if spec.name in SamplingFields.model_fields
    and spec.name not in ("stop", "stop_token_ids", "logit_bias", "max_tokens", "temperature")
)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What an API takes where request and task are silent. `max_tokens` None: all that there is room for."""

    max_tokens: int | None = SamplingParams().max_tokens
    temperature: float = SamplingParams().temperature


@dataclass(frozen=True, slots=True)
class Target:
    """What a request runs on. `version` None: the bare base model.

    `role`: live or canary, when the name left the choice to the aliases; else empty.
    """

    name: str
    version: PrefixVersion | None
    role: str = ""

    @property
    def prefix(self) -> PrefixRef | None:
        """The prefix as the engine names it."""
        return None if self.version is None else prefix_ref(self.version)

    @property
    def num_virtual_tokens(self) -> int:
        """Length of the prefix; 0 without one."""
        return 0 if self.version is None else self.version.manifest.num_virtual_tokens

    def described(self) -> dict[str, Any]:
        """The `prefixd` object of an answer."""
        if self.version is None:
            return {"task": None, "version": None, "digest": None}
        version = self.version
        return {"task": version.task, "version": version.version, "digest": version.digest}

    def headers(self) -> dict[str, str]:
        """`x-prefixd-*`; none for the base model."""
        if self.version is None:
            return {}
        return {f"x-prefixd-{key}": str(value) for key, value in self.described().items()}


def session_key(request: Request, user: str | None) -> str:
    """What keeps a client on one side of a canary: its `user`, else its session, else nothing does."""
    if user:
        return f"user:{user}"
    session = request.headers.get(SESSION_HEADER)
    return f"session:{session}" if session else f"request:{request_id_of(request)}"


def find_target(services: Services, name: str | None, param: str, key: str = "") -> Target:
    """What `task`, `task@v3` or the base model's id names. Raises `InvalidParameter`, `ModelNotFound`.

    `param`: the field that held the name. `key`: of `session_key`; without one the bare name of a task is
    its live version, whatever its canary. There is no fallback to the base model: a client that forgot
    the field would get fluent answers of the wrong task.
    """
    if not name:
        raise InvalidParameter(
            f"{param}: required; name a task, or {services.model_id!r} for the base model",
            param=param,
        )
    if name == services.model_id:
        return Target(name, None)
    try:
        return _resolve(services, name, key)
    except UnknownVersion as error:
        raise ModelNotFound(str(error), param=param) from None
    except (UnknownTask, InvalidTaskName):
        raise ModelNotFound(_not_found(services, name), param=param) from None


def _resolve(services: Services, name: str, key: str) -> Target:
    version = services.store.resolve(name)
    _, _, selector = name.partition("@")
    if selector:
        return Target(name, version, selector if selector in (LIVE, CANARY) else "")
    canary = services.store.task(name).canary if key else None
    if canary is not None and takes_canary(
        version.task, canary.version.version, canary.weight, key
    ):
        return Target(name, canary.version, CANARY)
    return Target(name, version, LIVE)


def _not_found(services: Services, name: str) -> str:
    shown = name if len(name) <= 80 else name[:77] + "..."
    close = services.store.similar(name.partition("@")[0])
    hint = f"; close names: {', '.join(close)}" if close else ""
    return f"there is no task {shown!r}{hint}"


def sampling_params(
    fields: SamplingFields, target: Target, room: int, ours: Defaults
) -> SamplingParams:
    """The request's values over the task's defaults over `ours`. Raises `InvalidParameter`.

    `room`: tokens that still fit; a default of `max_tokens` is cut to it, an explicit one is not.
    """
    tasks = target.version.manifest.generation if target.version else GenerationDefaults()
    values: dict[str, Any] = {}
    for name in (*_SAMPLING_NAMES, "temperature"):
        value = getattr(fields, name)
        value = getattr(tasks, name, None) if value is None else value
        if value is not None:
            values[name] = value
    values.setdefault("temperature", ours.temperature)
    stop = list(tasks.stop) if fields.stop is None else fields.stop
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["stop_token_ids"] = tuple(fields.stop_token_ids or ())
    values["logit_bias"] = _logit_bias(fields.logit_bias or {})
    if fields.max_tokens is not None:
        values["max_tokens"] = fields.max_tokens
    else:
        default = tasks.max_tokens or ours.max_tokens or MAX_TOKENS
        values["max_tokens"] = max(min(default, room), 1)
    return SamplingParams(**values)


def _logit_bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """JSON has texts for keys; a token has one, so that no two biases are of one token."""
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key):
            raise InvalidParameter("logit_bias: expected token ids as keys", param="logit_bias")
    return tuple((int(key), bias) for key, bias in given.items())
