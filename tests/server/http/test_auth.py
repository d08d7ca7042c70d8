"""Keys in headers and in URLs, what a refusal says and counts, and what a wrong key costs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from prefix_store import keys as key_values
from prefix_store.keys import KeyScope
from server.http import auth
from server.metrics import AUTH_FAILURES
from tests.server.http.tenants import World, make_world

MODELS = "/v1/models"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.mark.parametrize("scheme", ["Bearer {}", "bearer {}", "BEARER   {}", "Bearer {} "])
def test_the_scheme_is_read_in_any_case_and_spaces_do_not_count(world: World, scheme: str) -> None:
    value = scheme.format(world.keys["acme"])

    assert world.ask("GET", MODELS, headers=[("Authorization", value)]).status == 200


@pytest.mark.parametrize(
    ("headers", "reason", "word"),
    [
        ([], "missing", "needs a key"),
        (["Basic eDp5"], "malformed", "Bearer"),
        (["Bearer"], "malformed", "Bearer"),
        (["Bearer the-api-key", "Bearer the-api-key"], "malformed", "several"),
        (["Bearer x"], "wrong", "not one of this server"),
        (["Bearer pfx_00000000_" + "A" * 43], "wrong", "not one of this server"),
    ],
)
def test_a_refusal_says_what_was_wrong_and_is_counted(
    world: World, headers: list[str], reason: str, word: str
) -> None:
    answer = world.ask("GET", MODELS, headers=[("authorization", value) for value in headers])

    assert answer.status == 401
    assert word in answer.json["error"]["message"]
    assert counted(world, reason) == 1


def test_a_key_that_ended_is_told_so_and_one_that_opens_other_routes_too(world: World) -> None:
    ended = world.key_store.create("acme", frozenset({KeyScope.INFER}))
    world.key_store.revoke(ended.key.id)

    assert "revoked" in world.ask("GET", MODELS, ended.text).json["error"]["message"]
    answer = world.ask("GET", "/admin/v1/tasks", "acme infer")
    assert (answer.status, answer.json["code"]) == (403, "insufficient_scope")
    assert "scope admin" in answer.json["detail"]
    answer = world.ask("GET", "/admin/v1/keys", "acme")
    assert (answer.status, "operator's key" in answer.json["detail"]) == (403, True)
    assert (counted(world, "revoked"), counted(world, "scope")) == (1, 2)


def test_a_wrong_secret_does_not_learn_that_its_id_is_right(world: World) -> None:
    right, ended = world.keys["acme"], world.key_store.create("acme", frozenset({KeyScope.INFER}))
    world.key_store.revoke(ended.key.id)
    answers = [
        world.ask("GET", MODELS, text).json["error"]
        for text in (
            right.rpartition("_")[0][:12] + "_" + "A" * 43,
            ended.text[:13] + "A" * 43,
            "pfx_00000000_" + "A" * 43,
            "x",
        )
    ]
    assert answers == [answers[0]] * 4


def test_every_reason_starts_at_nothing_and_no_other_is_counted(world: World) -> None:
    assert [counted(world, reason) for reason in AUTH_FAILURES] == [0] * 6


def test_the_work_for_a_wrong_key_does_not_grow_with_the_keys(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes are compared once for each key of the environment and once for a stored one, whatever comes."""
    compared: list[int] = []

    def count(given: str, key: str) -> bool:
        compared[-1] += 1
        return key_values.is_key(given, key)

    monkeypatch.setattr(auth, "is_key", count)
    for _ in range(50):
        world.key_store.create("acme", frozenset({KeyScope.INFER}))
    for text in ("x", "", "pfx_00000000_" + "A" * 43, world.keys["acme"], "the-api-key"):
        compared.append(0)
        world.ask("GET", MODELS, text)
    assert [number for number in compared if number] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "query",
    ["api_key={}", "key=x", "api-key=x", "token=", "access_token=x", "Authorization=Bearer+x", "q={}",
     "a=1&b={}", "{}", "x=%70fx_0123abcd_aaaaaaaaaaaaaaaaaaaa", "%61pi_key=x"],
)  # fmt: skip
@pytest.mark.parametrize("path", [MODELS, "/healthz", "/admin/v1/tasks", "/nowhere"])
def test_a_key_in_a_query_is_refused_whatever_else_was_sent(
    world: World, path: str, query: str
) -> None:
    for key in (None, "operator"):
        answer = world.ask("GET", path, key, query=query.format(world.keys["acme"]))
        assert answer.status == 400
        assert "key_in_url" in answer.text
        assert world.keys["acme"] not in answer.text


def test_a_key_in_a_path_is_refused(world: World) -> None:
    for path in ("/v1/models/{}", "/admin/v1/keys/{}", "/{}/v1/models", "/admin/v1/tasks/{}"):
        answer = world.ask("GET", path.format(world.keys["acme"]), "operator")
        assert answer.status == 400
        assert world.keys["acme"] not in answer.text


def test_queries_that_routes_know_hold_no_key(world: World) -> None:
    for query in ("limit=5&after=key&q=token", "q=pfx_", "tenant=api"):
        assert world.ask("GET", "/admin/v1/tasks", "operator", query=query).status == 200


def test_no_key_is_logged_or_counted_by_name(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts = [*world.keys.values(), "pfx_00000000_" + "A" * 43, "x-wrong-key-x"]
    for text in texts:
        for path in (MODELS, "/admin/v1/tasks", "/admin/v1/keys", "/metrics"):
            world.ask("GET", path, text)
            world.ask("GET", path, text, query=f"key={text}")
        world.ask("GET", f"/v1/models/{text}", text)
    metrics = world.ask("GET", "/metrics", "operator").text
    for text in texts:
        if text != "the-api-key":  # no secret, and part of the server's own words
            assert text not in caplog.text
        assert text not in metrics


def counted(world: World, reason: str) -> float:
    value = world.metrics.registry.get_sample_value(
        "prefixd_auth_failures_total", {"reason": reason}
    )
    assert value is not None
    return value
