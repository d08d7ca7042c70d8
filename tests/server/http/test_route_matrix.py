"""Every route of the app x {no key, bad key, wrong scope, foreign tenant} x tricks: refused, and nothing is learnt.

The routes come from the app itself, so one without a rule fails here before anybody can reach it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from prefix_store.keys import KeyScope
from server.http.routes import SCOPES, Scope
from tests.prefix_store.builders import make_artifact
from tests.server.http.fakes import FakeEngine, make_app
from tests.server.http.tenants import World, make_world

ROUTES = sorted(
    (method, route.path)
    for route in make_app(FakeEngine()).routes
    if isinstance(route, Route)
    for method in (route.methods or set())
)
CLOSED = [(m, p) for m, p in ROUTES if SCOPES[p] is not Scope.PUBLIC]
SECRETS = ("poet", "clerk", "hidden", "ledger", "shared", "acme", "beta")
every_route = pytest.mark.parametrize(("method", "template"), ROUTES)
closed_routes = pytest.mark.parametrize(("method", "template"), CLOSED)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def path_of(template: str, task: str = "poet", key_id: str = "0123abcd") -> str:
    names = {"task": task, "version": "v1", "alias": "live", "tenant": "beta", "key_id": key_id}
    names["model_id:path"] = task
    return re.sub(r"\{([^}]+)\}", lambda match: names[match[1]], template)


# How routes of inference name a task: what one of them does not understand, another does.
SHAPES: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt": lambda task: {"model": task, "task": task, "prompt": "hi", "max_tokens": 2},
    "chat": lambda task: {
        "model": task,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
    },
    "tokens": lambda task: {"model": task, "tokens": [5]},
    "tgi": lambda task: {"inputs": "hi", "parameters": {"adapter_id": task, "max_new_tokens": 2}},
}


def body_of(method: str, template: str) -> Any:
    """What makes a request of the route a good one."""
    if template == "/admin/v1/tasks/{task}" and method == "PUT":
        return make_artifact(seed=99)
    bodies: dict[str, Any] = {
        "aliases/{alias}": {"version": 1},
        "compile": {"prompt": "hi"},
        "keys": {"tenant": "acme", "scopes": ["infer"]},
    }
    found = [body for end, body in bodies.items() if template.endswith(end)]
    if found or template.startswith("/admin"):
        return found[0] if found and method in ("POST", "PUT") else None
    return SHAPES["prompt"]("poet") if method == "POST" else None


def ask(world: World, method: str, template: str, key: str | None, **more: Any) -> Any:
    path = more.pop("path", None) or path_of(template)
    return world.ask(method, path, key, body=body_of(method, template), **more)


def test_the_matrix_has_every_route_with_a_rule() -> None:
    assert {path for _, path in ROUTES} == set(SCOPES)
    assert len(ROUTES) >= 30


# ---- no key, a bad key ---------------------------------------------------------------------------


def bad_keys(world: World) -> list[tuple[str, list[tuple[str, str]]]]:
    """What is no key, as headers: near misses of right ones, keys that ended, other schemes, several at once."""
    right = world.keys["staff"]
    ended = world.key_store.create("", frozenset(KeyScope))
    world.key_store.revoke(ended.key.id)
    basic, bearer = ("authorization", f"Basic {right}"), ("authorization", f"Bearer {right}")
    texts = [
        "", " ", "None", "x", right[:-1], right + "x", right.upper(), right.swapcase(), ended.text,
        right.replace("pfx_", ""), right.rpartition("_")[0] + "_" + "a" * 43, "*", f'"{right}"',
        f"{right},{right}", f"{right} {right}", "pfx_" + "0" * 8 + "_" + "A" * 43, "\xff\xfe", "x" * 9000,
    ]  # fmt: skip
    cases = [(f"key {text[:20]!r}", [("authorization", f"Bearer {text}")]) for text in texts]
    return [
        *cases,
        ("none", []),
        ("basic", [basic]),
        ("no scheme", [("authorization", right)]),
        ("tab", [("authorization", f"Bearer\t{right}")]),
        ("token scheme", [("authorization", f"Token {right}")]),
        ("two right ones", [bearer, bearer]),
        ("a wrong one first", [("authorization", "Bearer x"), bearer]),
        ("a wrong one last", [bearer, ("authorization", "Bearer x")]),
        (
            "other headers",
            [("x-api-key", right), ("api-key", right), ("proxy-authorization", right)],
        ),
        ("cookie", [("cookie", f"authorization=Bearer {right}; key={right}")]),
    ]


@closed_routes
def test_without_a_right_key_a_route_is_401_and_does_nothing(
    world: World, method: str, template: str
) -> None:
    cases = bad_keys(world)
    before = world.state()
    for name, headers in cases:
        answer = ask(world, method, template, None, headers=headers)
        assert answer.status == 401, name
        assert answer.headers["www-authenticate"].startswith("Bearer"), name
        assert not any(secret in answer.text for secret in SECRETS), name
    assert world.state() == before


@pytest.mark.parametrize(("method", "template"), [r for r in ROUTES if r not in CLOSED])
def test_public_routes_tell_nothing_of_tasks(world: World, method: str, template: str) -> None:
    answer = ask(world, method, template, None)

    assert answer.status in (200, 503)
    assert not any(secret in answer.text for secret in SECRETS)


# ---- tricks with paths, hosts and methods ----------------------------------------------------------

TRICKS = (
    "{p}/", "/{p}", "//{p}//", "{p}/.", "{p}/..", "{p}/../../healthz", "/healthz/..{p}",
    "/healthz/../..{p}", "/healthz{p}", "{p};/healthz", "{p};x=1", "{p}?/healthz", "{p}#/healthz",
    "{p}%2f", "{p}%2e%2e%2fhealthz", "/.{p}", "/./{p}", "{p}\x00", "{p}\x00/healthz", "{p} ", " {p}",
    "{p}\t", "{P}", "{p}\\..\\healthz", "\\{p}", "http://testserver{p}", "//evil.example{p}", "{p}.json",
    "{p}\u2215..", "{p}\n", "/healthz\n{p}",
)  # fmt: skip
HOSTS = (
    "a/?x=",
    "a/healthz?",
    "healthz",
    "[::1",
    "",
    "testserver/healthz#",
    "a\\@b",
    "..",
    "x" * 300,
)
HEADERS = (
    ("x-original-url", "/healthz"),
    ("x-rewrite-url", "/healthz"),
    ("x-forwarded-prefix", "/healthz"),
    ("x-forwarded-host", "localhost"),
    ("x-forwarded-for", "127.0.0.1"),
    ("x-http-method-override", "OPTIONS"),
    ("forwarded", "for=127.0.0.1;host=localhost"),
    ("origin", "http://127.0.0.1:8000"),
    ("upgrade", "websocket"),
)


@closed_routes
def test_no_spelling_of_the_path_gets_in(world: World, method: str, template: str) -> None:
    before = world.state()
    for trick in TRICKS:
        path = path_of(template)
        path = trick.replace("{p}", path).replace("{P}", path.upper())
        for key in (None, "acme infer"):
            wanted = {401, 404, 405} | ({403} if key else set())
            if key and SCOPES[template] is Scope.INFER:
                continue  # it may go in, by whatever spelling
            answer = ask(world, method, template, key, path=path)
            assert answer.status in wanted, (trick, key)
            assert not any(f'"{secret}' in answer.text for secret in SECRETS), (trick, key)
    assert world.state() == before


@closed_routes
def test_neither_host_nor_forwarding_headers_get_in(
    world: World, method: str, template: str
) -> None:
    before = world.state()
    for host in HOSTS:
        assert ask(world, method, template, None, host=host).status == 401, host
    for header in HEADERS:
        assert ask(world, method, template, None, headers=[header]).status == 401, header
    assert ask(world, method, template, None, headers=list(HEADERS)).status == 401
    assert world.state() == before


@every_route
def test_no_other_method_gets_in(world: World, method: str, template: str) -> None:
    served = {m for m, path in ROUTES if path == template}
    before = world.state()
    for other in {
        "GET",
        "POST",
        "PUT",
        "DELETE",
        "PATCH",
        "HEAD",
        "OPTIONS",
        "TRACE",
        "get",
    } - served:
        answer = world.ask(other, path_of(template))
        public = SCOPES[template] is Scope.PUBLIC
        assert answer.status == (405 if public else 401), other
    assert world.state() == before


# ---- the wrong scope -----------------------------------------------------------------------------


@closed_routes
def test_a_key_opens_the_routes_of_its_scopes_and_no_other(
    world: World, method: str, template: str
) -> None:
    scope = SCOPES[template]
    opened = {
        Scope.INFER: {"operator", "staff", "api", "acme", "acme infer"},
        Scope.ADMIN: {"operator", "staff", "acme", "acme admin"},
        Scope.METRICS: {"operator", "api", "prometheus"},
        Scope.OPERATOR: {"operator", "staff"},
    }[scope]
    for name in world.keys.keys() - {"beta"}:
        fresh = world.state()
        status = ask(world, method, template, name).status
        assert (status == 403) == (name not in opened), (name, status)
        assert status != 401, name
        if status == 403:
            assert world.state() == fresh, name


# ---- another tenant ------------------------------------------------------------------------------


def without_names(answer: Any, name: str) -> tuple[Any, ...]:
    text = answer.text.replace(name, "NAME")
    text = re.sub(r"\d{4}-\d\d-\d\dT[0-9:.]+", "TIME", text)
    ids = ("x-request-id", "content-length")
    headers = {key: value for key, value in answer.headers.items() if key not in ids}
    return answer.status, headers, re.sub(r"[0-9a-f]{32}", "ID", text)


def asked_about(world: World, method: str, template: str, name: str, body: Any) -> Any:
    """What beta is told of a task, and that acme's tasks are as they were."""
    path = path_of(template, name).replace("s/live", "s/canary")
    answer = world.ask(method, path, "beta", body=body)
    theirs = [t for t in world.store.tasks() if t.name.startswith("acme~")]
    assert [t.name for t in theirs] == ["acme~hidden", "acme~poet"]
    assert theirs[0].live is not None
    assert theirs[0].live.digest not in answer.text
    return answer


NAMED = [(m, p) for m, p in ROUTES if "{task}" in p or "{model_id" in p]
INFERRING = [(m, p) for m, p in ROUTES if SCOPES[p] is Scope.INFER and m == "POST"]


@pytest.mark.parametrize(("method", "template"), NAMED)
@pytest.mark.parametrize("short", [False, True])
def test_a_foreign_task_in_a_path_fares_as_one_that_does_not_exist(
    tmp_path: Path, method: str, template: str, short: bool
) -> None:
    """Same status, same words, same headers, and nothing happens; `hidden` is of acme, `absent` of nobody."""
    answers = []
    for task in ("hidden", "absent"):
        name = task if short else f"acme~{task}"
        world = make_world(tmp_path / task)
        before = world.state()
        answer = asked_about(world, method, template, name, body_of(method, template))
        makes_its_own = short and template.endswith(("{task}", "compile")) and method != "GET"
        if not makes_its_own or method == "DELETE":
            assert answer.status in (403, 404)
            assert world.state() == before
        answers.append(without_names(answer, name))

    assert answers[0] == answers[1]


@pytest.mark.parametrize(("method", "template"), INFERRING)
@pytest.mark.parametrize("short", [False, True])
def test_so_does_one_in_a_body(tmp_path: Path, method: str, template: str, short: bool) -> None:
    """In every shape. One of them is the route's own: with it, the owner gets an answer."""
    names = {task: task if short else f"acme~{task}" for task in ("hidden", "absent")}
    worlds = {task: make_world(tmp_path / task) for task in names}
    statuses: set[int] = set()
    own: set[int] = set()
    for shape in SHAPES.values():
        told = []
        for task, name in names.items():
            before = worlds[task].state()
            answer = asked_about(worlds[task], method, template, name, shape(name))
            assert worlds[task].state() == before
            told.append(without_names(answer, name))
            statuses.add(answer.status)
        assert told[0] == told[1]
        path = path_of(template)
        own.add(worlds["hidden"].ask(method, path, "acme", body=shape(names["hidden"])).status)

    assert min(statuses) >= 400
    assert 404 in statuses, "no shape here names a task as this route does: add one"
    assert 200 in own


@every_route
def test_what_is_listed_names_no_foreign_task(world: World, method: str, template: str) -> None:
    if method != "GET" or "{" in template:
        return
    for key in ("beta", "acme", "api"):
        answer = world.ask(method, template, key)
        foreign = {
            "beta": ("acme~", "hidden", "poet"),
            "acme": ("ledger",),
            "api": ("acme~", "beta~"),
        }
        if SCOPES[template] is not Scope.METRICS and template != "/openapi.json":
            assert not any(name in answer.text for name in foreign[key]), key
