"""Two tenants and an operator over one store, and a client that sends exactly what a test says.

`acme` and `beta` own tasks, the operator two more. What is asked goes to the ASGI app as uvicorn would hand it on: no
client library repairs the path, the host or the headers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from prefix_store.key_store import KeyStore
from prefix_store.keys import KeyScope
from prefix_store.store import PrefixStore
from server.http.app import create_app
from server.metrics import Metrics
from tests.prefix_store.builders import make_artifact
from tests.server.http.fakes import ADMIN_KEY, FakeEngine, make_services, store_with_tasks

API_KEY = "the-api-key"
ACME_TASKS = ("acme~hidden", "acme~poet")
BETA_TASKS = ("beta~ledger", "beta~shared")
INFER, ADMIN, METRICS = KeyScope.INFER, KeyScope.ADMIN, KeyScope.METRICS


@dataclass(frozen=True)
class Answer:
    """What came back over ASGI."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class World:
    """`keys` by name: operator, api (of the environment); acme, beta (infer and admin); and one for each single scope."""

    app: FastAPI
    engine: FakeEngine
    store: PrefixStore
    key_store: KeyStore
    metrics: Metrics
    keys: dict[str, str] = field(default_factory=dict)

    def ask(
        self,
        method: str,
        path: str,
        key: str | None = None,
        *,
        body: Any = None,
        headers: Sequence[tuple[str, str]] = (),
        host: str = "testserver",
        query: str = "",
    ) -> Answer:
        """`key`: a name in `keys`, or the text of a key. `path`: as uvicorn decodes it. `body`: JSON, or bytes."""
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        sent = [("host", host), *headers, ("content-length", str(len(data)))]
        if body is not None and not isinstance(body, bytes):
            sent.append(("content-type", "application/json"))
        if key is not None:
            sent.append(("authorization", f"Bearer {self.keys.get(key, key)}"))
        return asyncio.run(_over_asgi(self.app, method, path, sent, data, query))

    def complete(self, key: str | None, model: str, **fields: Any) -> Answer:
        """The answer to a completion."""
        body = {"model": model, "prompt": "hi", "max_tokens": 3, **fields}
        return self.ask("POST", "/v1/completions", key, body=body)

    def state(self) -> object:
        """All that a request could have changed."""
        tasks = [(t.name, t.versions, t.live, t.canary, t.grants) for t in self.store.tasks()]
        engine = self.engine
        did = [len(engine.requests), engine.evicted, engine.warmed, engine.pins]
        return repr((tasks, self.key_store.listed(), did))


def make_world(directory: Path, **changes: Any) -> World:
    """Two tenants and an operator; `changes` of the services."""
    engine, store = FakeEngine(), store_with_tasks()
    for seed, task in enumerate((*ACME_TASKS, *BETA_TASKS), start=20):
        store.put(task, make_artifact(seed=seed))
    store.grant("beta~shared", "acme")
    store.grant("clerk", "acme")
    key_store = KeyStore(directory / "keys")
    changes = {"api_key": API_KEY, "keys": key_store, **changes}
    services = make_services(engine, store=store, **changes)
    world = World(create_app(services), engine, store, key_store, services.metrics)
    world.keys = {"operator": ADMIN_KEY, "api": API_KEY}
    for name, tenant, scopes in (
        ("acme", "acme", {INFER, ADMIN}),
        ("beta", "beta", {INFER, ADMIN}),
        ("acme infer", "acme", {INFER}),
        ("acme admin", "acme", {ADMIN}),
        ("staff", "", {INFER, ADMIN}),
        ("prometheus", "", {METRICS}),
    ):
        world.keys[name] = key_store.create(tenant, frozenset(scopes)).text
    return world


async def _over_asgi(
    app: FastAPI, method: str, path: str, headers: list[tuple[str, str]], body: bytes, query: str
) -> Answer:
    messages: list[Any] = []
    received = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        while not received:
            await asyncio.Event().wait()
        return received.pop()

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
        "client": ("10.0.0.9", 5),
        "server": ("testserver", 80),
        "state": {},
    }
    await app(scope, receive, send)
    start = messages[0]
    text = b"".join(m.get("body", b"") for m in messages[1:]).decode("utf-8", "replace")
    found = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
    return Answer(start["status"], found, text)
