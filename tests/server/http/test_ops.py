"""Probes and metrics, as orchestrators and Prometheus see them."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.http.app import create_app
from tests.server.http.fakes import ADMIN, FakeEngine, make_app, make_services


def test_a_live_engine_is_healthy(client: TestClient) -> None:
    for path in ("/healthz", "/health"):
        response = client.get(path)
        assert (response.status_code, response.json()["status"]) == (200, "ok")
        assert response.json()["requests_running"] == 2


@pytest.mark.parametrize(
    ("alive", "age", "word"), [(False, 0.0, "thread"), (True, 21.0, "seconds")]
)
def test_a_dead_or_stuck_engine_is_neither_healthy_nor_ready(
    engine: FakeEngine, alive: bool, age: float, word: str
) -> None:
    with TestClient(make_app(engine, hang_seconds=20.0)) as client:
        engine.health.alive, engine.health.heartbeat_age_seconds = alive, age
        for path in ("/healthz", "/readyz"):
            response = client.get(path)
            assert response.status_code == 503
            assert word in response.json()["reasons"][0]


def test_a_fault_that_was_found_is_told_by_both_probes(engine: FakeEngine) -> None:
    app = make_app(engine)
    with TestClient(app) as client:
        app.state.lifecycle.fault = "the engine hangs"
        for path in ("/healthz", "/readyz"):
            assert client.get(path).json()["reasons"] == ["the engine hangs"]
            assert client.get(path).status_code == 503


def test_ready_begins_with_the_start_and_ends_with_draining(engine: FakeEngine) -> None:
    calls = []

    async def start() -> None:
        calls.append("start")

    async def stop() -> None:
        calls.append("stop")

    app = create_app(make_services(engine), on_startup=start, on_shutdown=stop)
    before = TestClient(app)
    assert before.get("/readyz").status_code == 503
    assert before.get("/healthz").status_code == 200

    with TestClient(app) as client:
        assert calls == ["start"]
        assert client.get("/readyz").status_code == 200
        assert "prefixd_ready 1.0" in client.get("/metrics").text
        app.state.lifecycle.draining = True
        assert client.get("/readyz").json()["reasons"] == ["the server is shutting down"]
        assert client.get("/healthz").status_code == 200
    assert calls == ["start", "stop"]


def test_metrics_come_as_openmetrics_when_asked(client: TestClient) -> None:
    plain = client.get("/metrics")
    openmetrics = client.get("/metrics", headers={"accept": "application/openmetrics-text"})

    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


@pytest.mark.parametrize(
    "accept", ["text/plain; version=x", "application/openmetrics-text; version=", ";;,"]
)
def test_a_strange_accept_header_still_gets_metrics(client: TestClient, accept: str) -> None:
    response = client.get("/metrics", headers={"accept": accept})

    assert response.status_code == 200
    assert list(text_string_to_metric_families(response.text))


def test_requests_are_counted_by_template_and_never_by_what_a_client_sent(
    client: TestClient,
) -> None:
    client.get("/v1/models/poet")
    client.get("/secret-path")
    client.request("BREW", "/healthz")
    client.get("/admin/v1/tasks")
    client.get("/admin/v1/tasks", headers=ADMIN | {"authorization": "Bearer no"})

    text = client.get("/metrics").text
    assert 'method="GET",route="/v1/models/{model_id:path}",status="200"' in text
    assert 'method="GET",route="unmatched",status="404"' in text
    assert 'method="other",route="/healthz",status="405"' in text
    assert 'prefixd_auth_failures_total{reason="missing"} 1.0' in text
    assert 'prefixd_auth_failures_total{reason="wrong"} 1.0' in text
    assert "secret-path" not in text
    assert "BREW" not in text


def test_the_stores_tiers_are_shown(client: TestClient) -> None:
    text = client.get("/metrics").text

    assert 'prefixd_prefix_cache_entries{tier="disk"} 3.0' in text
    assert 'prefixd_prefix_cache_capacity_bytes{tier="host"} 0.0' in text


def test_the_api_description_has_the_bodies(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "prompt", "max_tokens", "stream"} <= body["properties"].keys()
    bodies = [
        method["requestBody"]
        for path in paths.values()
        for method in path.values()
        if "requestBody" in method
    ]
    assert len(bodies) > 5
    assert "$ref" not in str(bodies), "a reference would point out of the body's schema, at nothing"
    turns = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    turn = turns["schema"]["properties"]["messages"]["items"]
    assert turn["properties"]["role"]["enum"][0] == "developer"
