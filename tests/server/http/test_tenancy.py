"""What tenants can do with their own tasks, with those granted to them, and what the operator sees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prefix_store.audit_log import AuditLog
from prefix_store.keys import KeyScope
from server.http.caller import Caller
from tests.prefix_store.builders import make_artifact
from tests.server.http.tenants import World, make_world

TASKS = "/admin/v1/tasks"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def names_of(answer: Any) -> list[str]:
    return [entry["task"] for entry in answer.json["data"]]


def models_of(world: World, key: str | None) -> list[str]:
    return [entry["id"] for entry in world.ask("GET", "/v1/models", key).json["data"]]


# ---- names ---------------------------------------------------------------------------------------


def test_two_tenants_have_tasks_of_one_name(world: World) -> None:
    world.ask("PUT", f"{TASKS}/poet", "beta", body=make_artifact(seed=77))

    digests = {
        key: world.complete(key, "poet").json["prefixd"]["digest"]
        for key in ("acme", "beta", "api")
    }
    assert len(set(digests.values())) == 3
    assert world.complete("acme", "acme~poet").json["prefixd"] == {
        "task": "acme~poet",
        "version": 1,
        "digest": digests["acme"],
    }


def test_the_model_list_has_what_a_key_may_use_as_it_may_write_it(world: World) -> None:
    base = "org/tiny"
    assert models_of(world, "acme infer") == [base, "hidden", "poet", "beta~shared", "clerk"]
    assert models_of(world, "beta") == [base, "ledger", "shared"]
    assert models_of(world, "api") == [base, "clerk", "poet"]
    assert len(models_of(world, "operator")) == 7
    for key in ("acme infer", "beta", "api", "operator"):
        for name in models_of(world, key):
            assert world.ask("GET", f"/v1/models/{name}", key).json["id"] == name
            assert world.complete(key, name).status == 200


def test_hints_name_only_what_the_key_may_use(world: World) -> None:
    def hint(key: str, name: str) -> str:
        answer = world.complete(key, name)
        assert answer.status == 404
        return str(answer.json["error"]["message"])

    assert hint("beta", "hiden") == "there is no task 'hiden'"
    assert hint("acme", "hiden").endswith("close names: hidden")
    assert hint("acme", "acme~hiden").endswith("close names: hidden")
    assert hint("acme", "beta~share").endswith("close names: beta~shared")
    assert hint("acme", "beta~ledgr").endswith("close names: beta~shared")
    assert "acme~hidden" in hint("operator", "acme~hiden")
    assert hint("api", "acme~hiden") == "there is no task 'acme~hiden'"


def test_aliases_and_versions_are_of_the_tenants_own_task(world: World) -> None:
    world.ask("PUT", f"{TASKS}/poet", "acme", body=make_artifact(seed=78), query="activate=false")
    world.ask("PUT", f"{TASKS}/poet/aliases/canary", "acme", body={"version": 2, "weight": 1.0})

    assert world.complete("acme", "poet").json["prefixd"]["version"] == 2
    assert world.complete("acme", "poet@live").json["prefixd"]["version"] == 1
    assert world.complete("acme", "acme~poet@v2").json["prefixd"]["task"] == "acme~poet"
    assert world.complete("api", "poet@canary").status == 404
    assert world.store.task("poet").canary is None


def test_a_tenants_task_of_its_own_comes_before_a_granted_one(world: World) -> None:
    assert world.complete("acme", "clerk").json["prefixd"]["task"] == "clerk"

    world.ask("PUT", f"{TASKS}/clerk", "acme", body=make_artifact(seed=79))
    assert world.complete("acme", "clerk").json["prefixd"]["task"] == "acme~clerk"
    assert world.complete("api", "clerk").json["prefixd"]["task"] == "clerk"


def test_no_tenant_names_a_task_like_the_base_model(tmp_path: Path) -> None:
    world = make_world(tmp_path, model_id="tiny")
    for name in ("tiny", "acme~tiny"):
        for key in ("acme", "operator"):
            answer = world.ask("PUT", f"{TASKS}/{name}", key, body=make_artifact(seed=1))
            assert (answer.status, answer.json["code"]) == (400, "invalid_task_name")


@pytest.mark.parametrize("name", ["a~b~c", "~poet", "acme~", "Acme~poet", "acme~~poet", "acme~.p"])
def test_what_is_no_full_name_is_refused(world: World, name: str) -> None:
    for key in ("acme", "operator"):
        answer = world.ask("PUT", f"{TASKS}/{name}", key, body=make_artifact(seed=1))
        assert (answer.status, answer.json["code"]) == (400, "invalid_task_name")
        assert world.complete(key, name).json["error"]["code"] == "model_not_found"


# ---- the admin API -------------------------------------------------------------------------------


def test_an_admin_lists_and_changes_its_tenants_tasks_alone(world: World) -> None:
    assert names_of(world.ask("GET", TASKS, "acme")) == ["acme~hidden", "acme~poet"]
    assert world.ask("DELETE", f"{TASKS}/hidden", "acme").status == 204
    assert world.ask("DELETE", f"{TASKS}/acme~poet", "acme").status == 204
    assert names_of(world.ask("GET", TASKS, "acme")) == []
    assert len(names_of(world.ask("GET", TASKS, "operator"))) == 4
    assert world.store.task("poet").live is not None, "the operator's own"


def test_the_operator_sees_everything_with_its_owner(world: World) -> None:
    for key in ("operator", "staff"):
        listed = world.ask("GET", TASKS, key).json["data"]
        owners = {entry["task"]: entry["tenant"] for entry in listed}
        assert owners["acme~poet"] == "acme"
        assert owners["poet"] is None
        assert len(owners) == 6
    assert names_of(world.ask("GET", TASKS, "operator", query="tenant=beta")) == [
        "beta~ledger",
        "beta~shared",
    ]
    assert names_of(world.ask("GET", TASKS, "operator", query="tenant=")) == ["clerk", "poet"]
    assert names_of(world.ask("GET", TASKS, "acme", query="tenant=beta")) == []


def test_the_operator_uploads_for_a_tenant(world: World) -> None:
    answer = world.ask("PUT", f"{TASKS}/acme~new", "operator", body=make_artifact(seed=80))

    assert (answer.status, answer.json["task"]) == (201, "acme~new")
    assert world.complete("acme infer", "new").status == 200
    assert world.complete("api", "acme~new").status == 404


def test_compiling_makes_a_task_of_the_tenant(world: World) -> None:
    answer = world.ask("POST", f"{TASKS}/brief/compile", "acme", body={"prompt": "be brief"})

    assert (answer.status, answer.json["task"]) == (201, "acme~brief")
    foreign = world.ask("POST", f"{TASKS}/acme~x/compile", "beta", body={"prompt": "be brief"})
    assert (foreign.status, foreign.json["detail"]) == (404, "there is no task 'acme~x'")


def test_an_upload_for_another_tenant_is_refused_before_it_is_read(world: World) -> None:
    answer = world.ask("PUT", f"{TASKS}/acme~new", "beta", body=b"not an artifact at all")

    assert (answer.status, answer.json["code"]) == (404, "unknown_task")


def test_the_cache_report_of_a_tenant_has_its_own_prefixes_and_no_more(world: World) -> None:
    report = world.ask("GET", "/admin/v1/cache", "acme").json

    assert [e["task"] for e in report["disk"]["entries"]] == ["acme~poet", "acme~hidden"]
    assert report["disk"]["num_entries"] == 2
    assert report["disk"]["bytes"] == sum(e["bytes"] for e in report["disk"]["entries"])
    assert report["device"] == {"num_entries": 0, "bytes": 0, "entries": []}
    whole = world.ask("GET", "/admin/v1/cache", "operator").json
    assert whole["disk"]["num_entries"] == 7
    assert whole["device"]["blocks"] == 100


def test_evicting_leaves_bytes_that_another_tenant_has_too(world: World) -> None:
    same = make_artifact(seed=81)
    world.ask("PUT", f"{TASKS}/twin", "acme", body=same)
    world.ask("PUT", f"{TASKS}/twin", "beta", body=same)

    assert world.ask("POST", f"{TASKS}/twin/evict", "acme").status == 202
    assert world.engine.evicted == []
    assert world.ask("POST", f"{TASKS}/poet/evict", "acme").status == 202
    assert world.engine.evicted == [world.store.resolve("acme~poet").digest]
    assert world.ask("POST", f"{TASKS}/acme~twin/evict", "operator").status == 202
    assert len(world.engine.evicted) == 2


def test_deleting_forgets_the_pin_and_the_series_of_that_task_alone(world: World) -> None:
    for name in ("poet", "acme~poet"):
        assert world.ask("POST", f"{TASKS}/{name}/pin", "operator").status == 200
    world.ask("DELETE", f"{TASKS}/poet", "acme")

    assert set(world.engine.pins) == {"poet"}


# ---- grants --------------------------------------------------------------------------------------


def test_a_grant_lets_another_tenant_infer_and_no_more(world: World) -> None:
    assert world.complete("acme", "beta~ledger").status == 404
    answer = world.ask("PUT", f"{TASKS}/ledger/grants/acme", "beta")
    assert (answer.status, answer.json["grants"], answer.json["changed"]) == (200, ["acme"], True)
    again = world.ask("PUT", f"{TASKS}/beta~ledger/grants/acme", "operator")
    assert not again.json["changed"]

    assert world.complete("acme infer", "beta~ledger").status == 200
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/versions/1/content"),
        ("POST", "/warm"),
    ):
        assert world.ask(method, f"{TASKS}/beta~ledger{path}", "acme").status == 404
    assert names_of(world.ask("GET", TASKS, "acme")) == ["acme~hidden", "acme~poet"]


def test_an_ended_grant_ends_with_the_next_request(world: World) -> None:
    assert world.complete("acme", "beta~shared").status == 200
    assert world.ask("DELETE", f"{TASKS}/shared/grants/acme", "beta").status == 204

    assert world.complete("acme", "beta~shared").status == 404
    assert "beta~shared" not in models_of(world, "acme")
    assert world.ask("DELETE", f"{TASKS}/shared/grants/acme", "beta").status == 204


def test_who_got_a_grant_can_neither_pass_it_on_nor_end_it(world: World) -> None:
    for method in ("PUT", "DELETE"):
        assert world.ask(method, f"{TASKS}/beta~shared/grants/acme", "acme").status == 404
    assert world.complete("acme", "beta~shared").status == 200


def test_a_deleted_task_takes_its_grants_with_it(world: World) -> None:
    world.ask("DELETE", f"{TASKS}/shared", "beta")
    world.ask("PUT", f"{TASKS}/shared", "beta", body=make_artifact(seed=82))

    assert world.complete("acme", "beta~shared").status == 404


def test_a_tenant_that_can_not_be_is_granted_nothing(world: World) -> None:
    answer = world.ask("PUT", f"{TASKS}/shared/grants/No", "beta")

    assert (answer.status, answer.json["code"]) == (400, "invalid_tenant_name")
    assert not world.ask("PUT", f"{TASKS}/shared/grants/beta", "beta").json["changed"]


# ---- keys over HTTP ------------------------------------------------------------------------------


def test_a_key_made_over_http_works_with_the_next_request_and_is_shown_once(world: World) -> None:
    body = {"tenant": "acme", "scopes": ["infer"], "expires_in_seconds": 60, "note": "app"}
    made = world.ask("POST", "/admin/v1/keys", "operator", body=body)

    assert made.status == 201
    assert made.headers["cache-control"] == "no-store"
    assert (made.json["tenant"], made.json["scopes"], made.json["state"]) == (
        "acme",
        ["infer"],
        "active",
    )
    assert world.complete(made.json["key"], "poet").json["prefixd"]["task"] == "acme~poet"
    listed = world.ask("GET", "/admin/v1/keys", "operator", query="tenant=acme")
    assert made.json["id"] in [entry["id"] for entry in listed.json["data"]]
    assert {entry["tenant"] for entry in listed.json["data"]} == {"acme"}
    assert made.json["key"] not in listed.text


def test_a_revoked_key_stops_with_the_next_request(world: World) -> None:
    key = world.key_store.create("acme", frozenset({KeyScope.INFER}))
    assert world.complete(key.text, "poet").status == 200
    assert world.ask("DELETE", f"/admin/v1/keys/{key.key.id}", "staff").status == 204

    answer = world.complete(key.text, "poet")
    assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key")
    assert "revoked" in answer.json["error"]["message"]


def test_a_key_stops_at_its_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    key = world.key_store.create("acme", frozenset({KeyScope.INFER}), expires_in_seconds=3600)
    assert world.complete(key.text, "poet").status == 200

    from server.http import auth

    end = key.key.expires_at
    monkeypatch.setattr(auth, "datetime", type("Late", (), {"now": staticmethod(lambda _: end)}))
    assert "expired" in world.complete(key.text, "poet").json["error"]["message"]


def test_both_keys_of_a_rotation_work_until_the_overlap_ends(world: World) -> None:
    old = world.key_store.create("acme", frozenset({KeyScope.INFER}))
    path = f"/admin/v1/keys/{old.key.id}/rotate"
    new = world.ask("POST", path, "operator", body={"overlap_seconds": 3600})

    assert new.status == 201
    for text in (old.text, new.json["key"]):
        assert world.complete(text, "poet").status == 200
    last = world.ask(
        "POST", f"/admin/v1/keys/{new.json['id']}/rotate", "operator", body={"overlap_seconds": 0}
    )
    assert world.complete(new.json["key"], "poet").status == 401
    assert world.complete(last.json["key"], "poet").status == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "", {"scopes": []}, 400, "invalid_parameter"),
        ("POST", "", {"scopes": ["root"]}, 400, "invalid_parameter"),
        ("POST", "", {"scopes": ["infer"], "tenant": "No"}, 400, "invalid_tenant_name"),
        ("POST", "", {"scopes": ["infer"], "tenant": ""}, 400, "invalid_parameter"),
        ("POST", "", {"scopes": ["metrics"], "tenant": "acme"}, 400, "key_not_issued"),
        ("POST", "", {"scopes": ["infer"], "expires_in_seconds": -1}, 400, "key_not_issued"),
        ("POST", "", {"scopes": ["infer"], "sha256": "x"}, 400, "invalid_parameter"),
        ("POST", "/00000000/rotate", {}, 404, "unknown_key"),
        ("POST", "/00000000/rotate", {"overlap_seconds": -1}, 400, "key_not_issued"),
        ("DELETE", "/00000000", None, 404, "unknown_key"),
    ],
)
def test_what_is_no_key_is_refused(
    world: World, method: str, path: str, body: Any, status: int, code: str
) -> None:
    answer = world.ask(method, f"/admin/v1/keys{path}", "operator", body=body)

    assert (answer.status, answer.json["code"]) == (status, code)


def test_every_key_is_told_apart_in_the_audit_log_and_none_is_in_it(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit")
    world = make_world(tmp_path, audit=audit)
    world.ask("PUT", f"{TASKS}/new", "acme", body=make_artifact(seed=83))
    world.ask("DELETE", f"{TASKS}/beta~ledger", "acme")
    world.ask("DELETE", f"{TASKS}/poet", "acme infer")
    made = world.ask(
        "POST", "/admin/v1/keys", "staff", body={"tenant": "acme", "scopes": ["infer"]}
    )
    world.ask("DELETE", f"/admin/v1/keys/{made.json['id']}", "operator")

    text = b"".join(path.read_bytes() for path in (tmp_path / "audit").iterdir()).decode()
    ids = {name: re.sub(r"^pfx_([0-9a-f]{8})_.*", r"\1", key) for name, key in world.keys.items()}
    lines = text.splitlines()
    assert len(lines) == 5
    for line, who, tenant, task in zip(
        lines,
        ("acme", "acme", "acme infer", "staff"),
        ("acme", "acme", "acme", None),
        ("acme~new", "beta~ledger", "acme~poet", None),
        strict=False,
    ):
        assert f'"who":"{ids[who]}"' in line
        assert ('"tenant":"acme"' in line) == (tenant is not None)
        assert task is None or f'"task":"{task}"' in line
    assert f'"new_key":"{made.json["id"]}"' in lines[3]
    assert f'"key":"{made.json["id"]}"' in lines[4]
    for key in (*world.keys.values(), made.json["key"]):
        assert key not in text


# ---- the single-tenant set-up --------------------------------------------------------------------


def test_without_any_key_for_it_inference_is_open_to_the_operators_tasks(tmp_path: Path) -> None:
    world = make_world(tmp_path, api_key=None, keys=None)

    for key in (None, "whatever"):
        assert world.complete(key, "poet").json["prefixd"]["task"] == "poet"
        assert world.complete(key, "acme~poet").status == 404
        assert models_of(world, key) == ["org/tiny", "clerk", "poet"]
        assert world.ask("GET", "/metrics", key).status == 200
    assert world.ask("GET", TASKS).status == 401


def test_the_first_key_closes_inference_and_its_end_does_not_open_it(tmp_path: Path) -> None:
    world = make_world(tmp_path, api_key=None)
    for key in (None, "whatever"):
        assert world.complete(key, "poet").status == 401
        assert world.ask("GET", "/metrics", key).status == 401
    for made in world.key_store.listed():
        world.key_store.revoke(made.id)
    assert world.complete(None, "poet").status == 401
    assert world.complete("operator", "poet").status == 200


def test_the_keys_of_the_environment_have_the_operators_tasks(world: World) -> None:
    assert world.complete("api", "poet").json["prefixd"]["task"] == "poet"
    assert world.complete("operator", "acme~poet").json["prefixd"]["task"] == "acme~poet"
    assert world.ask("GET", "/metrics", "api").status == 200


# ---- what goes to the engine ---------------------------------------------------------------------


def test_the_engine_gets_the_tenant_and_a_salt_that_no_other_tenant_can_send(world: World) -> None:
    salts = ["", "x", "acme~x", "~x", "beta~x"]
    for key in ("acme", "beta", "api"):
        for salt in salts:
            name = {"acme": "poet", "beta": "ledger", "api": "poet"}[key]
            assert world.complete(key, name, cache_salt=salt).status == 200

    requests = world.engine.requests
    assert [r.tenant for r in requests] == ["acme"] * 5 + ["beta"] * 5 + [""] * 5
    assert len({r.cache_salt for r in requests}) == 15
    assert {r.cache_salt.partition("~")[0] == r.tenant for r in requests} == {True}


def test_only_an_administrating_key_without_a_tenant_is_the_operators_hand() -> None:
    everything, client = frozenset(KeyScope), frozenset({KeyScope.INFER})

    assert Caller("k", "", everything).is_operator
    assert not Caller("k", "", client).is_operator
    assert not Caller("k", "acme", everything).is_operator
