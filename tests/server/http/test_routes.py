"""Who may call what: the table of routes, the keys, the paths that try to get around them."""

from __future__ import annotations

import itertools

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from server.http.gate import client_id, normalised
from server.http.routes import ROUTES, SCOPES, Scope, template_of
from tests.server.http.fakes import ADMIN, ADMIN_KEY, FakeEngine, make_app

API_KEY = "the-api-key"
PATHS = {
    template: template.replace("{task}", "poet")
    .replace("{version}", "v1")
    .replace("{alias}", "live")
    .replace("{tenant}", "acme")
    .replace("{key_id}", "0123abcd")
    .replace("{model_id:path}", "a/b")
    for template in SCOPES
}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def guarded() -> TestClient:
    return TestClient(make_app(FakeEngine(), api_key=API_KEY))


def test_every_route_of_the_app_has_a_rule() -> None:
    routes = make_app(FakeEngine()).routes

    assert all(isinstance(route, Route) for route in routes), "a mount would hide its routes"
    paths = {route.path for route in routes if isinstance(route, Route)}
    assert paths == set(SCOPES)


def test_all_methods_of_a_path_need_the_same_key() -> None:
    """The gate judges by path: a second scope would be the one of all of them."""
    assert {route.path: route.scope for route in ROUTES} == {
        route.path: route.scope for route in reversed(ROUTES)
    }


def test_only_the_probes_are_public() -> None:
    public = {path for path, scope in SCOPES.items() if scope is Scope.PUBLIC}

    assert public == {"/health", "/healthz", "/ping", "/readyz"}


def test_each_path_finds_its_own_template() -> None:
    assert {template: template_of(path) for template, path in PATHS.items()} == {
        template: template for template in SCOPES
    }


@pytest.mark.parametrize(
    ("method", "template", "scope"), [(r.method, r.path, r.scope) for r in ROUTES]
)
def test_a_route_opens_to_the_right_keys_and_to_no_other(
    guarded: TestClient, method: str, template: str, scope: Scope
) -> None:
    def status(headers: dict[str, str]) -> int:
        return guarded.request(method, PATHS[template], headers=headers).status_code

    wrong = [
        {},
        bearer("nope"),
        bearer(""),
        {"authorization": f"Basic {ADMIN_KEY}"},
        {"x-api-key": API_KEY},
    ]
    for headers in wrong:
        assert (status(headers) == 401) == (scope is not Scope.PUBLIC), headers
    assert (status(bearer(API_KEY)) == 403) == (scope in (Scope.ADMIN, Scope.OPERATOR))
    assert status(bearer(ADMIN_KEY)) not in (401, 403)


def test_without_an_api_key_inference_is_open_and_admin_is_not(client: TestClient) -> None:
    assert client.get("/v1/models").status_code == 200
    assert client.get("/admin/v1/tasks").status_code == 401
    assert client.get("/admin/v1/tasks", headers=ADMIN).status_code == 200


def test_without_an_admin_key_the_admin_api_is_closed_to_everyone() -> None:
    client = TestClient(make_app(FakeEngine(), admin_key=None))

    for headers in ({}, bearer("None"), bearer("x")):
        assert client.get("/admin/v1/tasks", headers=headers).status_code == 401


@pytest.mark.parametrize("host", ["testserver", "a/?x=", "healthz", "[::1"])
@pytest.mark.parametrize(
    "path",
    [
        "/admin//v1/tasks",
        "//admin/v1/tasks",
        "/admin/v1/tasks/",
        "/admin/v1/tasks///",
        "/admin/v1//tasks?x=/healthz",
        "/admin/v1/tasks#/healthz",
        "/healthz/../admin/v1/tasks",
        "/admin/v1/tasks/..%2f..%2fhealthz",
        "/admin/v1/tasks%2fpoet",
        "/ADMIN/v1/tasks",
    ],
)
def test_no_spelling_of_a_path_or_host_gets_around_the_key(
    client: TestClient, path: str, host: str
) -> None:
    response = client.request("GET", "http://testserver" + path, headers={"host": host})

    assert response.status_code in (401, 404)
    assert "poet" not in response.text


def test_unknown_paths_are_answered_in_openai_shape(client: TestClient) -> None:
    response = client.post("/v1/embeddings", json={})

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "no_such_route"


def test_a_known_path_with_another_method_is_405_in_the_shape_of_its_part(
    client: TestClient,
) -> None:
    v1, admin = client.put("/v1/completions"), client.post("/admin/v1/tasks", headers=ADMIN)

    assert v1.status_code == admin.status_code == 405
    assert v1.json()["error"]["code"] == "method_not_allowed"
    assert v1.headers["allow"] == "POST"
    assert admin.headers["content-type"] == "application/problem+json"


def test_a_missing_key_says_how_to_send_one(guarded: TestClient) -> None:
    response = guarded.get("/v1/models")

    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in response.json()["error"]["message"]


def test_a_key_with_bytes_beyond_ascii_is_wrong_and_not_an_error(guarded: TestClient) -> None:
    key = {b"authorization": b"Bearer \xff\xfe"}
    response = guarded.get("/v1/models", headers=key)

    assert response.status_code == 401


@pytest.mark.parametrize("path", ["/v1/models/", "/v1//models", "/v1///models//"])
def test_doubled_and_trailing_slashes_are_forgiven(client: TestClient, path: str) -> None:
    assert client.get(path).json()["object"] == "list"


def test_normalising_a_path_twice_changes_nothing_more() -> None:
    for parts in itertools.product("/a.", repeat=5):
        once = normalised("/" + "".join(parts))
        assert normalised(once) == once


def test_every_answer_has_our_request_id_and_echoes_the_clients(client: TestClient) -> None:
    first = client.get("/healthz", headers={"x-request-id": "mine-1"})
    second = client.get("/nowhere", headers={"x-request-id": "mine-1"})

    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.headers["x-client-request-id"] == "mine-1"
    assert second.headers["x-client-request-id"] == "mine-1"
    assert "x-client-request-id" not in client.get("/healthz").headers


def test_an_echoed_id_is_short_and_printable() -> None:
    assert client_id("a" * 500) == "a" * 128
    assert client_id("a\x00b\u00ffc d\r\n") == "abcd"
