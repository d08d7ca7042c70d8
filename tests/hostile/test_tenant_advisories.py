"""One test for each advisory and issue of other servers that is about who may reach whose model; see each docstring."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from prefix_store import records
from prefix_store.errors import InvalidTaskName
from prefix_store.spec import check_task_name, full_name, tenant_of
from server.config import ServeConfig, check_exposure
from server.errors import ConfigError
from tests.prefix_store.builders import make_artifact
from tests.server.http.tenants import World, make_world

TASKS = "/admin/v1/tasks"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.mark.parametrize(
    "host", ["a/?x=", "a/healthz?", "a/healthz#", "localhost/healthz/..", "a:b@c"]
)
def test_the_host_header_is_no_part_of_the_path_that_is_judged(world: World, host: str) -> None:
    """CVE-2026-48710 (Starlette), CVE-2026-48746 (vLLM), CVE-2026-49468 (LiteLLM): it changed `request.url.path`."""
    assert world.ask("GET", TASKS, host=host).status == 401
    assert world.ask("GET", TASKS, "acme infer", host=host).status == 403


@pytest.mark.parametrize("path", ["/tokenize", "/invocations", "/pause", "/update_weights", "/openapi.json",
                                  "/docs", "/redoc", "/metrics", "/generate", "/admin", "/"])  # fmt: skip
def test_what_is_outside_of_v1_is_closed_too(world: World, path: str) -> None:
    """vLLM guards the prefixes /v1, /v2, ...; CVE-2026-115918: a check that one route had forgotten."""
    for method in ("GET", "POST"):
        assert world.ask(method, path).status in (401, 404)


def test_the_server_does_not_open_to_the_network_by_default() -> None:
    """CVE-2023-48022 (Ray), and how vLLM and TGI start: without keys, on every address."""
    assert ServeConfig().host == "127.0.0.1"
    with pytest.raises(ConfigError, match="PREFIXD_ADMIN_KEY"):
        check_exposure(ServeConfig(host="0.0.0.0"))


def test_a_clients_request_id_names_nothing(world: World) -> None:
    """CVE-2026-105755, CVE-2026-116176 (vLLM): X-Request-Id collided with another request's; vllm#10583."""
    for key in ("acme", "beta"):
        name = "poet" if key == "acme" else "ledger"
        body = {"model": name, "prompt": "hi", "max_tokens": 2}
        headers = [("x-request-id", "same")]
        assert world.ask("POST", "/v1/completions", key, body=body, headers=headers).status == 200
    first, second = world.engine.requests
    assert first.request_id != second.request_id
    assert "same" not in first.request_id + second.request_id


def test_a_private_task_that_is_resident_is_not_served_to_whoever_names_it(world: World) -> None:
    """LoRAX `infer.rs`: the index of adapters knows neither source nor token, so a loaded private one was everyone's."""
    assert world.complete("acme", "hidden").status == 200
    assert world.ask("POST", f"{TASKS}/hidden/warm", "acme").status == 202
    for name in ("hidden", "acme~hidden", "acme~hidden@v1", "acme~hidden@live"):
        assert world.complete("beta", name).status == 404
    digest = world.store.resolve("acme~hidden").digest
    for name in (f"ledger@{digest}", digest, f"acme~hidden@{digest}"):
        assert world.complete("beta", name).status == 404


def test_naming_unknown_tasks_allocates_nothing(world: World) -> None:
    """LoRAX: the map of adapters is never pruned, so random names grew it without bound."""

    def left_behind(number: int) -> object:
        """After another unknown name of each kind: what there is, and how many series the metrics have."""
        assert world.complete("beta", f"made-up-{number}").status == 404
        assert world.complete("beta", f"acme~made-up-{number}").status == 404
        series = world.ask("GET", "/metrics", "operator").text.count("\n")
        return world.state(), sorted(world.store._catalog._state), series

    left_behind(0)  # the first answers of a route and status have series of their own
    after_one = left_behind(1)
    assert [left_behind(number) for number in range(2, 30)] == [after_one] * 28


def test_two_names_never_become_one(world: World) -> None:
    """LoRAX `s3.py`: `/` became `--`, so that `a/b--c` and `a--b/c` were one folder."""
    parts = ["a", "a-b", "b", "a--b", "b--c", "c", "a.b", "b.c"]
    names = [full_name(tenant, task) for tenant, task in itertools.product(["", *parts[:4]], parts)]
    assert len(set(names)) == len({records.log_name(name) for name in names}) == 5 * 8
    for name in names:
        assert full_name(tenant_of(name), name.rpartition("~")[2]) == name


def test_a_tenant_whose_name_begins_like_anothers_sees_nothing_of_it(world: World) -> None:
    """LoRAX `s3.py`: `Prefix=task` also listed `task2`."""
    from prefix_store.keys import KeyScope

    near = world.key_store.create("acm", frozenset({KeyScope.INFER, KeyScope.ADMIN})).text
    longer = world.key_store.create("acme-2", frozenset({KeyScope.INFER, KeyScope.ADMIN})).text
    for key in (near, longer):
        assert world.ask("GET", TASKS, key).json["data"] == []
        assert [m["id"] for m in world.ask("GET", "/v1/models", key).json["data"]] == ["org/tiny"]
        assert world.complete(key, "poet").status == world.complete(key, "e~poet").status == 404


def test_the_model_list_is_no_list_of_all_tenants(world: World) -> None:
    """vLLM `/v1/models` lists every adapter to any holder of a key."""
    text = world.ask("GET", "/v1/models", "beta").text
    assert "acme" not in text
    assert "poet" not in text


@pytest.mark.parametrize(
    "name",
    ["../beta~ledger", "..", "acme~../../etc/passwd", "/etc/passwd", "a/../b", "..\\x", "acme~..", "a..b",
     "\x00", "acme~\x00", "%2e%2e", "file:///etc/passwd", "http://127.0.0.1/x", "hub:org/model", "．．", "poet\n"],
)  # fmt: skip
def test_a_name_is_a_key_and_no_path(world: World, name: str) -> None:
    """CVE-2023-31036, CVE-2025-23316 (Triton), CVE-2026-32981 (Ray), LoRAX `local.py`: names that became paths."""
    before = world.state()
    for key in ("acme", "operator"):
        assert world.complete(key, name).status == 404
        answer = world.ask("PUT", f"{TASKS}/{name}", key, body=make_artifact(seed=1))
        assert answer.status in (400, 404, 405)
    assert world.state() == before


def test_no_name_takes_long_to_refuse() -> None:
    """CVE-2025-71379 (vLLM): a regular expression over adapter names took exponential time."""
    started = time.process_time()
    for text in (
        "a" * 10**6,
        "a~" * 10**6,
        "a-" * 10**6 + "~",
        "~" * 10**6,
        "a" * 31 + "~" + "a" * 10**6,
    ):
        with pytest.raises(InvalidTaskName):
            check_task_name(text)
    assert time.process_time() - started < 1


def test_no_salt_of_a_client_reaches_another_tenants_prompts(world: World) -> None:
    """CVE-2025-46570: the time to the first token told of others' prompts; CVE-2026-105756: a salt ended the engine."""
    for salt in ("", "beta~", "~", "beta", "\u00e9" * 128):
        assert world.complete("acme", "beta~shared", cache_salt=salt).status == 200
        assert world.complete("beta", "shared", cache_salt=salt).status == 200
    theirs = {r.cache_salt for r in world.engine.requests if r.tenant == "beta"}
    others = {r.cache_salt for r in world.engine.requests if r.tenant == "acme"}
    assert not theirs & others
    assert world.complete("acme", "poet", cache_salt="x" * 129).status == 400


def test_a_replaced_task_is_another_to_every_cache(world: World) -> None:
    """vllm#42125, #30931: an adapter of the same name was served from the blocks of its predecessor."""
    before = world.store.resolve("acme~poet").digest
    world.ask("PUT", f"{TASKS}/poet", "acme", body=make_artifact(seed=98))
    world.complete("acme", "poet")

    [request] = world.engine.requests
    assert request.prefix is not None
    assert request.prefix.digest == world.store.resolve("acme~poet").digest != before


def test_a_refusal_shows_nothing_of_the_inside(world: World) -> None:
    """CVE-2026-22778 (vLLM): an error showed an address in memory."""
    for key in ("beta", "x", None):
        for path in ("/admin/v1/tasks/acme~hidden", "/v1/models/acme~hidden", "/nowhere"):
            text = world.ask("GET", path, key).text
            assert not any(
                word in text for word in ("0x", "Traceback", "prefix_store", ".py", "sha256:")
            )
