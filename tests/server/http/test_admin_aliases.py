"""Promotion, rollback and canaries over HTTP, and which version then answers."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.prefix_store.builders import make_artifact
from tests.server.http.fakes import ADMIN, FakeEngine

POET = "/admin/v1/tasks/poet"


def call(client: TestClient, method: str, path: str, body: Any = None, **headers: str) -> Any:
    return client.request(method, POET + path, json=body, headers=ADMIN | headers)


def live(client: TestClient) -> int:
    return int(call(client, "GET", "/aliases/live").json()["version"])


def answering(client: TestClient, name: str = "poet", **more: Any) -> int:
    """The version that the answer names."""
    headers = more.pop("headers", {})
    body = {"model": name, "prompt": "x", **more}
    response = client.post("/v1/completions", json=body, headers=headers)
    assert response.headers["x-prefixd-version"] == str(response.json()["prefixd"]["version"])
    return int(response.json()["prefixd"]["version"])


def test_promoting_moves_live_and_rolling_back_returns(client: TestClient) -> None:
    promoted = call(client, "PUT", "/aliases/live", {"version": 1})
    assert promoted.status_code == 200
    assert promoted.json()["changed"] is True
    assert promoted.headers["etag"] == f'"{promoted.json()["digest"]}"'
    assert (live(client), answering(client)) == (1, 1)
    assert call(client, "PUT", "/aliases/live", {"version": 1}).json()["changed"] is False
    assert call(client, "POST", "/rollback").json()["version"] == 2
    assert call(client, "POST", "/rollback").json()["version"] == 1
    spent = call(client, "POST", "/rollback")
    assert (spent.status_code, spent.json()["code"]) == (409, "no_such_move")
    assert answering(client) == 1


def test_a_version_that_is_only_stored_is_reached_by_its_number(client: TestClient) -> None:
    data = make_artifact(seed=9)
    put = client.put(POET + "?activate=false", content=data, headers=ADMIN)
    assert (put.status_code, put.json()["activated"], put.json()["version"]) == (200, False, 3)
    assert (answering(client), answering(client, "poet@v3")) == (2, 3)
    call(client, "PUT", "/aliases/canary", {"version": 3})
    assert answering(client, "poet@canary") == 3
    assert answering(client) == 2, "a canary without a weight takes nothing"


def test_bytes_that_are_an_older_version_become_live_again_and_no_new_version(
    client: TestClient,
) -> None:
    data = make_artifact(seed=1)
    stored = client.put(POET + "?activate=false", content=data, headers=ADMIN).json()
    assert (stored["version"], stored["created"], stored["activated"]) == (1, False, False)
    assert live(client) == 2
    again = client.put(POET, content=data, headers=ADMIN).json()
    assert (again["version"], again["created"], again["activated"]) == (1, False, True)
    assert live(client) == 1
    assert call(client, "POST", "/rollback").json()["version"] == 2
    assert call(client, "GET", "").json()["num_versions"] == 2


def test_a_task_without_a_live_version_is_listed_and_not_served(client: TestClient) -> None:
    path = "/admin/v1/tasks/fresh"
    put = client.put(path + "?activate=false", content=make_artifact(seed=9), headers=ADMIN)
    assert put.status_code == 201
    shown = client.get(path, headers=ADMIN)
    assert (shown.json()["live"], shown.json()["version"]) == (None, 1)
    assert "etag" not in shown.headers
    assert "fresh" not in [card["id"] for card in client.get("/v1/models").json()["data"]]
    refused = client.post("/v1/completions", json={"model": "fresh", "prompt": "x"})
    assert refused.status_code == 404
    assert "promote one" in refused.json()["error"]["message"]
    client.put(path + "/aliases/live", json={"version": 1}, headers=ADMIN)
    assert answering(client, "fresh") == 1


def test_the_canary_takes_its_share_and_each_user_always_the_same_side(client: TestClient) -> None:
    body = {"version": 1, "weight": 0.3}
    answer = call(client, "PUT", "/aliases/canary", body).json()
    assert (answer["version"], answer["weight"], answer["changed"]) == (1, 0.3, True)
    by_user = {user: answering(client, user=f"user-{user}") for user in range(150)}
    share = list(by_user.values()).count(1) / len(by_user)
    assert share == pytest.approx(0.3, abs=0.12)
    assert {u: answering(client, user=f"user-{u}") for u in range(20)} == {
        user: by_user[user] for user in range(20)
    }
    sessions = [answering(client, headers={"x-session-id": "a"}) for _ in range(12)]
    assert len(set(sessions)) == 1
    assert {answering(client) for _ in range(60)} == {1, 2}, "without a key it is drawn each time"
    assert answering(client, "poet@live", user="user-1") == 2
    assert answering(client, "poet@v2", user="user-1") == 2


def test_answers_are_counted_by_alias(client: TestClient, engine: FakeEngine) -> None:
    call(client, "PUT", "/aliases/canary", {"version": 1, "weight": 1.0})
    for name in ("poet", "poet@live", "poet@canary", "poet@v1", "clerk"):
        answering(client, name)
    assert [request.version_role for request in engine.requests] == [
        "canary", "live", "canary", "", "live",
    ]  # fmt: skip


def test_a_canary_that_is_promoted_is_no_canary_any_more(client: TestClient) -> None:
    call(client, "PUT", "/aliases/canary", {"version": 1, "weight": 0.5})
    assert call(client, "GET", "").json()["canary"] == {"version": 1, "weight": 0.5}
    call(client, "PUT", "/aliases/live", {"version": 1})
    assert call(client, "GET", "").json()["canary"] is None
    assert call(client, "GET", "/aliases/canary").status_code == 404
    refused = call(client, "PUT", "/aliases/canary", {"version": 1})
    assert (refused.status_code, refused.json()["code"]) == (409, "no_such_move")


def test_a_canary_ends(client: TestClient) -> None:
    call(client, "PUT", "/aliases/canary", {"version": 1, "weight": 1.0})
    assert call(client, "DELETE", "/aliases/canary").status_code == 204
    assert answering(client) == 2
    assert call(client, "DELETE", "/aliases/canary").status_code == 404


def test_moves_are_conditional_on_where_the_alias_points(client: TestClient) -> None:
    first, second = (f'"{v["digest"]}"' for v in call(client, "GET", "").json()["versions"][::-1])
    cases = [
        ("PUT", "/aliases/live", {"version": 1}, {"if-match": first}, 412),
        ("PUT", "/aliases/live", {"version": 1}, {"if-match": second}, 200),
        ("POST", "/rollback", None, {"if-match": second}, 412),
        ("POST", "/rollback", None, {"if-match": first}, 200),
        ("PUT", "/aliases/canary", {"version": 1}, {"if-match": "*"}, 412),
        ("PUT", "/aliases/canary", {"version": 1}, {"if-none-match": "*"}, 200),
        ("PUT", "/aliases/canary", {"version": 1}, {"if-none-match": "*"}, 412),
        ("PUT", "/aliases/canary", {"version": 1, "weight": 0.1}, {"if-match": first}, 200),
        ("DELETE", "/aliases/canary", None, {"if-match": second}, 412),
        ("DELETE", "/aliases/canary", None, {"if-match": first}, 204),
        ("POST", "/pin", None, {"if-match": first}, 412),
        ("POST", "/warm", None, {"if-match": first}, 412),
        ("POST", "/evict", None, {"if-match": first}, 412),
        ("POST", "/unpin", None, {"if-match": first}, 412),
        ("PUT", "/aliases/live", {"version": 1}, {"if-none-match": "*"}, 400),
        ("PUT", "/aliases/live", {"version": 1}, {"content-digest": "sha-256=:" + "A" * 43 + "=:"}, 400),
    ]  # fmt: skip
    for method, path, body, headers, status in cases:
        assert call(client, method, path, body, **headers).status_code == status, (path, headers)
    assert live(client) == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/aliases/live", {"version": 9}, 404, "v9"),
        ("/aliases/live", {"version": 1, "weight": 0.5}, 400, "weight"),
        ("/aliases/live", {"version": "v1"}, 400, "version"),
        ("/aliases/live", {"version": True}, 400, "version"),
        ("/aliases/live", {"version": 10**30}, 400, "version"),
        ("/aliases/live", {}, 400, "version"),
        ("/aliases/live", [], 400, "object"),
        ("/aliases/canary", {"version": 1, "weight": 1.5}, 400, "weight"),
        ("/aliases/canary", {"version": 1, "weight": -0.1}, 400, "weight"),
        ("/aliases/blue", {"version": 1}, 404, "live or canary"),
    ],
)
def test_a_move_that_makes_no_sense_is_refused_by_name(
    client: TestClient, path: str, body: Any, status: int, word: str
) -> None:
    response = call(client, "PUT", path, body)
    assert response.status_code == status
    assert word in response.json()["detail"]
    assert live(client) == 2


def test_live_can_not_be_removed(client: TestClient) -> None:
    assert call(client, "DELETE", "/aliases/live").status_code == 400


def test_a_pin_follows_every_way_in_which_live_moves(
    client: TestClient, engine: FakeEngine
) -> None:
    call(client, "POST", "/pin", {"ttl_seconds": 60})
    digests = {v["version"]: v["digest"] for v in call(client, "GET", "").json()["versions"]}
    assert engine.pins["poet"] == (digests[2], 60)
    call(client, "PUT", "/aliases/live", {"version": 1})
    assert engine.pins["poet"] == (digests[1], 60)
    call(client, "POST", "/rollback")
    assert engine.pins["poet"] == (digests[2], 60)
    engine.pin_refusal = "too many blocks"
    put = client.put(POET, content=make_artifact(seed=9), headers=ADMIN).json()
    assert put["warnings"] == ["the task is no longer pinned: too many blocks"]
