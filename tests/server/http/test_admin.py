"""The admin API: uploads that are proved, conditional and idempotent; lists, versions, removal."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.backends.memory import MemoryStagedBlob
from prefix_store.proof import NO_PROBE
from server.http import admin_upload
from server.http.app import create_app
from tests.prefix_store.builders import base_with, make_artifact
from tests.server.http.fakes import ADMIN, FakeEngine, make_app, make_services

TASKS = "/admin/v1/tasks"


def put(client: TestClient, task: str, content: Any, **headers: str) -> Any:
    return client.put(f"{TASKS}/{task}", content=content, headers=ADMIN | headers)


def content_digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def names(client: TestClient) -> list[str]:
    return [entry["task"] for entry in client.get(TASKS, headers=ADMIN).json()["data"]]


def test_a_first_upload_is_201_and_can_be_used_at_once(client: TestClient) -> None:
    data = make_artifact(seed=9, num_virtual_tokens=4, description="a test")

    response = put(client, "fresh", data)

    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    answer = response.json()
    assert response.status_code == 201
    assert response.headers["etag"] == f'"{digest}"'
    assert answer.pop("created_at")
    assert answer == {
        "object": "task",
        "task": "fresh",
        "version": 1,
        "digest": digest,
        "size": len(data),
        "num_virtual_tokens": 4,
        "description": "a test",
        "created": True,
        "activated": True,
        "recognised": "native artifact, format version 1",
        "assumed": [],
        "unverified": [NO_PROBE],
        "proof": {"smoke": "passed", "probe": None},
        "warnings": [],
    }
    use = client.post("/v1/completions", json={"model": "fresh", "prompt": "x"})
    assert use.json()["prefixd"]["digest"] == digest


def test_a_later_upload_is_200_with_the_next_version(client: TestClient) -> None:
    response = put(client, "clerk", make_artifact(seed=9))

    assert (response.status_code, response.json()["version"]) == (200, 2)


def test_the_same_bytes_again_make_no_version(client: TestClient) -> None:
    data = make_artifact(seed=9)
    first = put(client, "fresh", data)

    again = put(client, "fresh", data)

    assert (again.status_code, again.json()["created"]) == (200, False)
    assert again.json()["version"] == first.json()["version"] == 1


def test_warnings_come_with_the_answer(client: TestClient) -> None:
    response = put(client, "fresh", make_artifact(base_model={}))

    assert "fingerprint" in response.json()["warnings"][0]


def test_a_body_may_come_in_many_small_chunks(client: TestClient) -> None:
    data = make_artifact(seed=9)

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(data), 100):
            yield data[start : start + 100]

    assert put(client, "fresh", chunks()).status_code == 201


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "malformed_artifact"),
        (b"not an artifact", 400, "malformed_artifact"),
        (make_artifact()[:-1], 400, "malformed_artifact"),
        (make_artifact(base_with(model_type="gpt2")), 422, "incompatible_prefix"),
        (make_artifact(num_virtual_tokens=17), 422, "incompatible_prefix"),
    ],
)
def test_a_bad_artifact_changes_nothing_and_every_fault_is_listed(
    client: TestClient, content: bytes, status: int, code: str
) -> None:
    response = put(client, "fresh", content)

    problem = response.json()
    assert response.status_code == problem["status"] == status
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["type"] == f"urn:prefixd:error:{code}"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["errors"]
    assert all(set(fault) == {"pointer", "detail"} for fault in problem["errors"])
    assert names(client) == ["clerk", "poet"]


def test_an_announced_body_that_is_too_large_is_refused_unread(client: TestClient) -> None:
    def nothing() -> Iterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    response = put(client, "fresh", nothing(), **{"content-length": "99999999999999999999999"})

    assert response.status_code == 413
    assert response.json()["code"] == "artifact_too_large"


def test_an_unannounced_body_that_is_too_large_is_cut_off() -> None:
    services = make_services(FakeEngine())
    client = TestClient(create_app(services))
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 10 * services.store.max_artifact_bytes:
            sent += 2**20
            yield bytes(2**20)

    assert put(client, "fresh", endless()).status_code == 413


def test_a_compressed_upload_is_415(client: TestClient) -> None:
    response = put(client, "fresh", make_artifact(), **{"content-encoding": "gzip"})

    assert response.status_code == 415


@pytest.mark.parametrize("name", ["Poet", "a b", "..", ".x", "a" * 64, "a..b", "é", "a@v1"])
def test_a_bad_name_is_400(client: TestClient, name: str) -> None:
    response = put(client, name, make_artifact())

    assert response.status_code in (400, 404)  # the client itself resolves ".." away
    assert names(client) == ["clerk", "poet"]


def test_a_task_can_not_take_the_name_of_the_base_model() -> None:
    client = TestClient(make_app(FakeEngine(), model_id="tiny"))

    response = put(client, "tiny", make_artifact())

    assert (response.status_code, response.json()["code"]) == (400, "invalid_task_name")


def test_if_match_lets_only_one_of_two_editors_through(client: TestClient) -> None:
    etag = client.get(f"{TASKS}/clerk", headers=ADMIN).headers["etag"]

    first = put(client, "clerk", make_artifact(seed=8), **{"if-match": etag})
    second = put(client, "clerk", make_artifact(seed=9), **{"if-match": etag})

    assert (first.status_code, second.status_code) == (200, 412)
    assert second.json()["code"] == "precondition_failed"


def test_if_none_match_only_creates(client: TestClient) -> None:
    condition = {"if-none-match": "*"}

    assert put(client, "fresh", make_artifact(), **condition).status_code == 201
    assert put(client, "clerk", make_artifact(seed=8), **condition).status_code == 412


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("if-match", "sha256:abc"),
        ("if-match", '"a", "b"'),
        ("if-none-match", '"sha256:abc"'),
        ("content-digest", "md5=:abc:"),
        ("content-digest", "sha-256=:" + "!" * 44 + ":"),
        ("content-digest", "sha-256=:" + "=" * 44 + ":"),
    ],
)
def test_a_condition_that_is_not_understood_is_400_and_not_ignored(
    client: TestClient, header: str, value: str
) -> None:
    assert put(client, "fresh", make_artifact(), **{header: value}).status_code == 400


def test_a_content_digest_is_verified(client: TestClient) -> None:
    data = make_artifact()

    wrong = put(client, "fresh", data, **{"content-digest": content_digest(data + b"x")})
    right = put(client, "fresh", data, **{"content-digest": f"md5=:x:, {content_digest(data)}"})

    assert (wrong.status_code, wrong.json()["code"]) == (400, "digest_mismatch")
    assert right.status_code == 201


def test_the_list_is_paged_and_searched(client: TestClient) -> None:
    for number in range(5):
        put(client, f"t{number}", make_artifact(seed=number + 20))

    def page(**params: str) -> Any:
        return client.get(TASKS, headers=ADMIN, params=params).json()

    first = page(limit="3", q="t")
    second = page(limit="3", q="t", after=first["last_id"])
    assert [entry["task"] for entry in first["data"]] == ["poet", "t0", "t1"]
    assert [entry["task"] for entry in second["data"]] == ["t2", "t3", "t4"]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert page(q="nothing") == {"object": "list", "data": [], "has_more": False, "last_id": None}


@pytest.mark.parametrize("limit", ["0", "1001", "x", "9" * 5000])
def test_a_bad_limit_is_400(client: TestClient, limit: str) -> None:
    response = client.get(TASKS, headers=ADMIN, params={"limit": limit})

    assert response.status_code == 400
    assert response.json()["detail"].startswith("limit:")


def test_a_task_shows_its_versions_newest_first(client: TestClient) -> None:
    answer = client.get(f"{TASKS}/poet", headers=ADMIN).json()

    assert (answer["task"], answer["version"], answer["num_versions"]) == ("poet", 2, 2)
    assert [version["version"] for version in answer["versions"]] == [2, 1]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_task_is_404(client: TestClient, method: str) -> None:
    response = client.request(method, f"{TASKS}/nobody", headers=ADMIN)

    assert (response.status_code, response.json()["code"]) == (404, "unknown_task")


def test_a_deleted_task_is_gone_from_everywhere(client: TestClient, engine: FakeEngine) -> None:
    digests = {v["digest"] for v in client.get(f"{TASKS}/poet", headers=ADMIN).json()["versions"]}

    response = client.delete(f"{TASKS}/poet", headers=ADMIN)

    assert (response.status_code, response.content) == (204, b"")
    assert set(engine.evicted) == digests
    assert names(client) == ["clerk"]
    assert client.post("/generate", json={"task": "poet", "prompt": "x"}).status_code == 404


def test_a_deletion_can_be_conditional(client: TestClient) -> None:
    wrong = ADMIN | {"if-match": f'"sha256:{"0" * 64}"'}

    assert client.delete(f"{TASKS}/poet", headers=wrong).status_code == 412
    assert names(client) == ["clerk", "poet"]


def test_an_upload_that_stalls_is_408_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admin_upload, "STALL_SECONDS", 0.05)

    assert asyncio.run(_upload_then(asyncio.Event().wait))["status"] == 408


def test_a_client_that_leaves_its_upload_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    discarded = []
    monkeypatch.setattr(MemoryStagedBlob, "discard", lambda self: discarded.append(self))

    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert asyncio.run(_upload_then(leave))["status"] == 499
    assert discarded


async def _upload_then(then: Any) -> dict[str, Any]:
    """The start of an answer to an upload that begins well, and goes on with what `then` receives."""
    messages = [{"type": "http.request", "body": make_artifact()[:500], "more_body": True}]
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return messages.pop() if messages else await then()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "PUT",
        "path": f"{TASKS}/fresh",
        "headers": [(k.encode(), v.encode()) for k, v in ADMIN.items()],
        "query_string": b"",
    }
    app: Any = make_app(FakeEngine())
    await app(scope, receive, send)
    return sent[0]


def test_operations_are_counted(client: TestClient) -> None:
    put(client, "fresh", make_artifact())
    put(client, "fresh", make_artifact())
    put(client, "fresh", b"")
    client.delete(f"{TASKS}/fresh", headers=ADMIN)

    text = client.get("/metrics").text
    for operation, result in [
        ("upload", "created"),
        ("upload", "unchanged"),
        ("upload", "refused"),
        ("delete", "done"),
    ]:
        line = f'prefixd_admin_operations_total{{operation="{operation}",result="{result}"}} 1.0'
        assert line in text


def test_a_task_that_is_deleted_and_stored_again_is_counted_by_name(client: TestClient) -> None:
    client.delete(f"{TASKS}/poet", headers=ADMIN)
    put(client, "poet", make_artifact(seed=9))
    services = client.app.state.services  # type: ignore[attr-defined]
    services.metrics.rejected("queue_full", "poet", "generate")

    counted = 'prefixd_requests_total{endpoint="generate",outcome="rejected",task="poet"} 1.0'
    assert counted in client.get("/metrics").text
