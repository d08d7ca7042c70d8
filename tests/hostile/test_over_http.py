"""Hostile files through HTTP: 4xx each, as the validator said in process, and a store that is as it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from starlette.testclient import TestClient

from prefix_store import errors
from prefix_store.artifact import encode
from prefix_store.audit_log import verify
from prefix_store.backends.memory import MemoryBackend
from prefix_store.importers.recognition import ImportOptions
from prefix_store.spec import BaseSpec
from prefix_store.store import PrefixStore
from server.http.app import create_app
from server.http.errors import ERROR_KINDS, ErrorKind
from tests.hostile.foreign import FOREIGN
from tests.hostile.incompatible import INCOMPATIBLE
from tests.hostile.judge import judged
from tests.hostile.malformed import MALFORMED
from tests.hostile.mutation import Mutant, mutant
from tests.hostile.originals import BASE, LIMITS, originals
from tests.prefix_store.builders import manifest_for, random_kv
from tests.real_app import ADMIN, TASKS, RealApp, real_app
from tests.server.http import fakes
from tests.tiny_model_dir import save_tiny_model

NUM_MUTANTS: Final = 2000
SEED: Final = 2000
MAX_SECONDS: Final = 10.0  # of one answer: far more than any takes, far less than a hang


@dataclass(frozen=True)
class Server:
    """A server with real parts behind it, and the directory of its store."""

    app: RealApp
    root: Path

    @property
    def base(self) -> BaseSpec:
        return self.app.serving.store.base

    def state(self) -> str:
        """A hash of all that an upload could have changed: every file but the lock and the audit log, and the tasks."""
        store, sha = self.app.serving.store, hashlib.sha256()
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root)
            if name.parts[0] not in ("lock", "audit"):
                sha.update(f"{name}\n".encode())
                sha.update(path.read_bytes() if path.is_file() else b"")
        sha.update(repr((store.tasks(), store.stats().disk_bytes)).encode())
        return sha.hexdigest()

    def outcomes(self) -> list[str]:
        """What the audit log has, one for each request that would have changed something."""
        assert verify(self.root / "audit").ok
        lines = b"".join(path.read_bytes() for path in sorted((self.root / "audit").iterdir()))
        return [json.loads(line)["outcome"] for line in lines.splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    root = tmp_path_factory.mktemp("store")
    limit = LIMITS.max_num_virtual_tokens
    with real_app(model, root, max_num_virtual_tokens=limit) as app:
        assert app.put("task", originals(app.serving.store.base)[0].data).status_code == 201
        yield Server(app, root)


def refused_mutants(base: BaseSpec) -> Iterator[tuple[Mutant, ErrorKind]]:
    """Mutants that the validator refuses in process, and what HTTP must say of each."""
    files = [original for original in originals(base) if original.base == base]
    number = 0
    while True:
        one = mutant(number, SEED, files)
        judgement = judged(one)
        assert judgement.faults == ()
        if judgement.outcome != "accepted":
            yield one, ERROR_KINDS[getattr(errors, judgement.outcome)]
        number += 1


def query(options: ImportOptions) -> dict[str, Any]:
    return {
        "rebase": options.rebase,
        **({} if options.task_index is None else {"task_index": options.task_index}),
        **({} if options.peft_type is None else {"peft_type": options.peft_type}),
    }


@pytest.mark.slow
def test_mutants_are_refused_over_http_and_change_nothing(server: Server) -> None:
    before, tokens = server.state(), server.app.tokens("task", [5, 6, 7], 8)
    num_records = len(server.outcomes())
    statuses = set()
    for (one, kind), _ in zip(refused_mutants(server.base), range(NUM_MUTANTS), strict=False):
        started = time.monotonic()
        response = server.app.put("task", one.data, **query(one.original.options))
        assert time.monotonic() - started < MAX_SECONDS
        answer = response.json()
        assert (response.status_code, answer["code"]) == (kind.status, kind.code), one
        assert 400 <= response.status_code < 500
        statuses.add(response.status_code)
    assert statuses == {400, 413, 422}
    assert server.state() == before
    assert server.outcomes()[num_records:] == ["refused"] * NUM_MUTANTS
    assert server.app.tokens("task", [5, 6, 7], 8) == tokens


def test_a_mutant_that_is_valid_is_stored_by_the_same_path(server: Server) -> None:
    """Else the refusals above could have another reason than the files."""
    for original in originals(server.base):
        if original.base == server.base:
            task = original.name
            assert server.app.put(task, original.data, **query(original.options)).status_code == 201
            deleted = server.app.client.delete(f"{TASKS}/{task}", headers=ADMIN)
            assert deleted.status_code == 204


@pytest.mark.parametrize("value", [1e4, -1e4, 1e-40])
def test_values_at_the_limit_do_not_reach_the_requests_beside_them(
    server: Server, value: float
) -> None:
    """Row 14 of the threat table: what is finite in the file may overflow in attention, in that row alone."""
    keys, values = random_kv(server.base, 16)
    for index, tensor in enumerate((*keys, *values)):
        tensor[:] = value if index % 2 else -value
    extreme = encode(manifest_for(server.base, 16), keys, values)
    alone = server.app.tokens("task", [5, 6, 7], 40)
    assert server.app.put("extreme", extreme).status_code == 201

    def ask() -> int:
        body = {"model": "extreme", "prompt": [5, 6, 7], "max_tokens": 40}
        return int(server.app.client.post("/v1/completions", json=body).status_code)

    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask) for _ in range(3)]
        beside = server.app.tokens("task", [5, 6, 7], 40)
    assert beside == alone
    assert {answer.result() for answer in answers} <= {200, 500}
    server.app.client.delete(f"{TASKS}/extreme", headers=ADMIN)


@pytest.fixture(scope="module")
def client() -> TestClient:
    """Around a store for the base that the named files are meant for."""
    backend = MemoryBackend()
    store = PrefixStore(backend, BASE, LIMITS, host_cache_bytes=0)
    app = create_app(fakes.make_services(fakes.FakeEngine(), store=store))
    return TestClient(app)


NAMED: Final[dict[str, tuple[bytes, ImportOptions]]] = {
    **{name: (data, ImportOptions()) for name, data in {**MALFORMED, **INCOMPATIBLE}.items()},
    **{name: (file.data, file.options) for name, file in FOREIGN.items()},
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_file_is_refused_over_http(client: TestClient, name: str) -> None:
    data, options = NAMED[name]
    response = client.put(f"{TASKS}/task", content=data, headers=fakes.ADMIN, params=query(options))
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"
    assert client.get(TASKS, headers=fakes.ADMIN).json()["data"] == []
