"""Every request that changes something leaves exactly one record, refusals too, before the client hears of it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.audit_log import AuditLog, verify
from server.http.app import create_app
from server.http.routes import ACTIONS, ROUTES, Scope
from tests.prefix_store.builders import make_artifact
from tests.server.http.fakes import ADMIN, ADMIN_KEY, FakeEngine, make_services

POET = "/admin/v1/tasks/poet"


@pytest.fixture
def audited(tmp_path: Path) -> TestClient:
    services = make_services(FakeEngine(), audit=AuditLog(tmp_path))
    return TestClient(create_app(services))


def records(directory: Path) -> list[dict[str, Any]]:
    assert verify(directory).ok
    lines = b"".join(path.read_bytes() for path in sorted(directory.iterdir())).splitlines()
    return [json.loads(line) for line in lines]


def test_every_route_that_changes_something_has_an_action() -> None:
    hands = (Scope.ADMIN, Scope.OPERATOR)
    changing = {(r.method, r.path) for r in ROUTES if r.scope in hands and r.method != "GET"}
    assert changing == set(ACTIONS)


def test_a_change_is_recorded_with_who_what_and_how_it_ended(
    audited: TestClient, tmp_path: Path
) -> None:
    data = make_artifact(seed=9)
    response = audited.put(POET, content=data, headers=ADMIN)
    [record] = records(tmp_path)
    assert record["who"] == hashlib.sha256(ADMIN_KEY.encode()).hexdigest()[:12]
    assert record["request_id"] == response.headers["x-request-id"]
    assert record["source"] == "testclient"
    assert (record["action"], record["task"], record["version"]) == ("upload", "poet", 3)
    assert record["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert (record["size"], record["status"], record["outcome"]) == (len(data), 200, "done")
    assert ADMIN_KEY not in json.dumps(record)


def test_each_call_leaves_one_record_and_reading_leaves_none(
    audited: TestClient, tmp_path: Path
) -> None:
    calls: list[tuple[str, str, Any, str, int]] = [
        ("PUT", "/aliases/live", {"version": 1}, "set_live", 200),
        ("PUT", "/aliases/canary", {"version": 2, "weight": 0.5}, "set_canary", 200),
        ("DELETE", "/aliases/canary", None, "end_canary", 204),
        ("POST", "/rollback", None, "rollback", 200),
        ("POST", "/pin", {"ttl_seconds": 5}, "pin", 200),
        ("POST", "/unpin", None, "unpin", 204),
        ("POST", "/warm", None, "warm", 202),
        ("POST", "/evict", None, "evict", 202),
        ("PUT", "/aliases/canary", {"version": 2}, "set_canary", 409),
        ("PUT", "/aliases/live", {"version": 7}, "set_live", 404),
        ("PUT", "/aliases/blue", {"version": 1}, "set_blue", 404),
        ("PUT", "", None, "upload", 400),
        ("DELETE", "", None, "delete", 204),
        ("DELETE", "", None, "delete", 404),
    ]
    for method, path, body, _, status in calls:
        assert audited.request(method, POET + path, json=body, headers=ADMIN).status_code == status
    for path in ("", "/versions", "/versions/1/content"):
        audited.get(POET + path, headers=ADMIN)
    found = [(record["action"], record["status"]) for record in records(tmp_path)]
    assert found == [(action, status) for *_, action, status in calls]
    assert {record["task"] for record in records(tmp_path)} == {"poet"}


@pytest.mark.parametrize("key", [None, "wrong", ADMIN_KEY + "x"])
def test_a_refused_key_is_recorded_without_the_key(
    audited: TestClient, tmp_path: Path, key: str | None
) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    assert audited.delete(POET, headers=headers).status_code == 401
    [record] = records(tmp_path)
    assert (record["who"], record["status"], record["outcome"]) == ("unknown", 401, "refused")
    assert (record["action"], record["task"]) == ("delete", "poet")
    assert key is None or key not in json.dumps(record)


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize("path", ["{}", "{}/aliases/canary", "{}/grants/acme", "poet/grants/{}"])
def test_a_key_in_the_path_is_not_in_the_record(
    audited: TestClient, tmp_path: Path, method: str, path: str
) -> None:
    key = "pfx_0123456789ab_" + "A" * 43
    url = "/admin/v1/tasks/" + path.format(key)
    answer = audited.request(method, url, json={}, headers=ADMIN)

    assert (answer.status_code, answer.json()["code"]) == (400, "key_in_url")
    kept = b"".join(file.read_bytes() for file in sorted(tmp_path.iterdir()))
    assert b"pfx_" not in kept
    assert all("task" not in record for record in records(tmp_path))
    assert len(records(tmp_path)) == 1


def test_without_its_record_a_change_is_not_acknowledged(
    audited: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        response = audited.post(f"{POET}/evict", headers=ADMIN)
    assert (response.status_code, response.json()["code"]) == (507, "store_full")
    assert audited.post(f"{POET}/evict", headers=ADMIN).status_code == 202
    assert len(records(tmp_path)) == 1


def test_hostile_names_stay_one_line_of_ascii(audited: TestClient, tmp_path: Path) -> None:
    for name in ("a" * 5000, "%0a%0d", "é", '"}', "%e2%80%a8"):
        audited.delete(f"/admin/v1/tasks/{name}", headers=ADMIN)
    assert [len(record["task"]) <= 128 for record in records(tmp_path)] == [True] * 5
