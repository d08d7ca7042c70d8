"""What the HTTP layer needs of the rest, in one frozen object; made by `server.bootstrap`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request

from prefix_store.audit_log import AuditLog
from prefix_store.key_store import KeyStore
from server.engine.intake import Intake
from server.http.visible_store import VisibleStore
from server.metrics import Metrics
from server.types import (
    DeviceReport,
    GenerationRequest,
    PinState,
    PrefixRef,
    RequestOutput,
    TokenizerFacts,
    TokenText,
)


class OutputStream(Protocol):
    """`server.engine.async_engine.RequestStream`: the increments of one request."""

    async def __anext__(self) -> RequestOutput: ...

    async def aclose(self) -> None: ...


class EngineHealth(Protocol):
    """`server.engine.observer.EngineStatus`."""

    @property
    def alive(self) -> bool: ...
    @property
    def heartbeat_age_seconds(self) -> float: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...


class Engine(Protocol):
    """`server.engine.async_engine.AsyncEngine`, without the model libraries that it imports."""

    @property
    def max_model_len(self) -> int: ...

    def room(self, prefix: PrefixRef | None, num_prompt_tokens: int) -> int: ...

    async def tokenize(self, prompt: str, *, special_tokens: bool = True) -> tuple[int, ...]: ...

    async def tokenize_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> tuple[int, ...]: ...

    async def detokenize(self, token_ids: Sequence[int], param: str) -> str: ...

    def token_text(self, token_id: int) -> TokenText: ...

    def tokenizer_facts(self) -> TokenizerFacts: ...

    def submit(self, request: GenerationRequest) -> OutputStream: ...

    def warm(self, ref: PrefixRef) -> None: ...

    def evict(self, digest: str) -> None: ...

    async def pin(self, ref: PrefixRef, ttl_seconds: float | None = None) -> PinState: ...

    async def follow_pin(self, ref: PrefixRef) -> str | None: ...

    def unpin(self, task: str) -> None: ...

    async def device_report(self) -> DeviceReport: ...

    def status(self) -> EngineHealth: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """`admin_key`, `api_key`: the keys of the environment. Without an `api_key`, and while no key was made in `keys`,
    inference is open to everyone.

    `store`: as whoever asks sees it; in the services that the app is made of, all of it. `keys`, `audit`: None, in
    tests, for no keys but those two, and for no record of changes and refusals. `hang_seconds`: an engine that has not
    come round its loop for so long hangs.
    """

    engine: Engine
    store: VisibleStore
    intake: Intake
    metrics: Metrics
    model_id: str
    base_fingerprint: str
    version: str
    admin_key: str | None = None
    api_key: str | None = None
    keys: KeyStore | None = None
    max_body_bytes: int = 2**20
    max_request_seconds: float = 3600.0
    hang_seconds: float = 300.0
    audit: AuditLog | None = None


@dataclass(slots=True)
class Lifecycle:
    """Whether requests should be sent here: the one thing about the app that changes.

    `fault`: why they should not although the engine may look well, in a sentence.
    """

    ready: bool = False
    draining: bool = False
    fault: str | None = None


def services_of(request: Request) -> Services:
    """The services of the app that got this request, with the store as its caller sees it; put there by `gate`."""
    services = request.scope["prefixd.services"]
    assert isinstance(services, Services)
    return services


def lifecycle_of(request: Request) -> Lifecycle:
    """The lifecycle of the app that got this request."""
    lifecycle = request.app.state.lifecycle
    assert isinstance(lifecycle, Lifecycle)
    return lifecycle


def request_id_of(request: Request) -> str:
    """Our id of this request, given by `server.http.gate`."""
    return str(request.scope["prefixd.request_id"])
