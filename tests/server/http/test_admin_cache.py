"""Pin, warm, evict and the picture of the tiers; and the deletion that waits for running requests."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.backends.memory import MemoryBackend
from prefix_store.store import PrefixStore
from prefix_store.validation import Limits
from server.http.app import create_app
from tests.prefix_store.builders import TINY_BASE, make_artifact
from tests.server.http.fakes import ADMIN, FakeEngine, make_services, store_with_tasks, words

POET = "/admin/v1/tasks/poet"


def post(client: TestClient, path: str, body: Any = None) -> Any:
    return client.post(POET + path, json=body, headers=ADMIN)


def digest_of_version(client: TestClient, number: int) -> str:
    answer = client.get(f"{POET}/versions/{number}", headers=ADMIN).json()
    return str(answer["digest"])


def test_a_task_is_pinned_for_a_time_or_for_ever_and_unpinned(
    client: TestClient, engine: FakeEngine
) -> None:
    live = digest_of_version(client, 2)
    answer = post(client, "/pin", {"ttl_seconds": 3600}).json()
    assert (answer["digest"], answer["ttl_seconds"]) == (live, 3600)
    assert (answer["pinned_blocks"], answer["pin_budget_blocks"]) == (1, 10)
    assert engine.pins["poet"] == (live, 3600)
    assert client.post(f"{POET}/pin", headers=ADMIN).json()["ttl_seconds"] is None
    assert engine.pins["poet"] == (live, None)
    assert post(client, "/unpin").status_code == 204
    assert engine.pins == {}


def test_a_pin_beyond_the_budget_is_409_with_the_setting(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.pin_refusal = "the budget is 5 (pin_budget)"
    response = post(client, "/pin")
    assert (response.status_code, response.json()["code"]) == (409, "pin_refused")
    assert "pin_budget" in response.json()["detail"]


@pytest.mark.parametrize("ttl", [0, -1, "1", 1e12, True])
def test_a_ttl_that_makes_no_sense_is_400(client: TestClient, ttl: Any) -> None:
    assert post(client, "/pin", {"ttl_seconds": ttl}).status_code == 400


def test_warming_takes_the_live_version_or_the_one_named(
    client: TestClient, engine: FakeEngine
) -> None:
    assert post(client, "/warm").status_code == 202
    assert post(client, "/warm", {"version": 1}).json()["version"] == 1
    assert engine.warmed == [digest_of_version(client, 2), digest_of_version(client, 1)]
    assert post(client, "/warm", {"version": 9}).status_code == 404


def test_evicting_frees_all_versions_on_the_device_and_in_host_memory() -> None:
    engine = FakeEngine()
    store = PrefixStore(
        MemoryBackend(), TINY_BASE, Limits(max_num_virtual_tokens=16), host_cache_bytes=2**20
    )
    versions = [store.put("poet", make_artifact(seed=seed)).version for seed in (1, 2)]
    store.load(versions[0].digest)
    client = TestClient(create_app(make_services(engine, store=store)))
    answer = post(client, "/evict")
    assert (answer.status_code, answer.json()["from_host"]) == (202, 1)
    assert set(engine.evicted) == {version.digest for version in versions}
    assert not store.is_on_host(versions[0].digest)
    assert store.stats().disk_entries == 2


@pytest.mark.parametrize("path", ["/pin", "/unpin", "/warm", "/evict", "/rollback"])
def test_an_unknown_task_is_404(client: TestClient, path: str) -> None:
    response = client.post(f"/admin/v1/tasks/nobody{path}", headers=ADMIN)
    assert (response.status_code, response.json()["code"]) == (404, "unknown_task")


def test_the_cache_shows_every_tier(client: TestClient) -> None:
    answer = client.get("/admin/v1/cache", headers=ADMIN).json()
    device = answer["device"]
    assert (device["blocks"], device["blocks_used"], device["pin_budget_blocks"]) == (100, 7, 50)
    assert (device["bytes"], device["capacity_bytes"]) == (8, 800)
    [entry] = device["entries"]
    assert (entry["task"], entry["leases"], entry["pinned"], entry["pin_seconds_left"]) == (
        "poet", 2, True, 60.0,
    )  # fmt: skip
    assert answer["host"] == {
        "num_entries": 0, "bytes": 0, "capacity_bytes": 0, "entries": [],
    }  # fmt: skip
    assert answer["disk"]["num_entries"] == 3
    assert {(e["task"], e["version"], e["leases"]) for e in answer["disk"]["entries"]} == {
        ("clerk", 1, 0), ("poet", 1, 0), ("poet", 2, 0),
    }  # fmt: skip
    short = client.get("/admin/v1/cache?limit=1", headers=ADMIN).json()
    assert len(short["disk"]["entries"]) == 1


def test_a_running_request_keeps_the_bytes_of_a_deleted_task_until_it_ends() -> None:
    engine = FakeEngine()
    store = store_with_tasks()
    client = TestClient(create_app(make_services(engine, store=store)))
    digest = store.resolve("poet").digest
    before = store.stats().disk_entries
    seen: list[Any] = []

    def while_running(request: Any) -> Any:
        """The script is asked for when the request has been submitted."""
        entries = client.get("/admin/v1/cache", headers=ADMIN).json()["disk"]["entries"]
        seen.append({e["digest"]: e["leases"] for e in entries}[digest])
        assert client.delete(POET, headers=ADMIN).status_code == 204
        seen.append((store.stats().disk_entries, digest in engine.evicted))
        seen.append(store.load(digest).prefix.digest)
        return words(request, "a", "b")

    engine.script = while_running
    answer = client.post("/generate", json={"task": "poet", "prompt": "x"}).json()

    assert (answer["digest"], answer["text"]) == (digest, "ab")
    assert seen == [1, (before - 1, False), digest]
    assert store.stats().disk_entries == before - 2
    assert digest in engine.evicted
    assert store.num_holds(digest) == 0


@pytest.mark.parametrize("body", [{"prompt": ""}, {"prompt": "x", "temperature": 9}])
def test_a_refused_request_holds_nothing(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post("/v1/completions", json={"model": "poet", **body})
    assert response.status_code == 400
    entries = client.get("/admin/v1/cache", headers=ADMIN).json()["disk"]["entries"]
    assert {entry["leases"] for entry in entries} == {0}
