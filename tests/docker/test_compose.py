"""docker/compose.yaml and what it mounts: each thing that one file says of another is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs would be one more dependency

from server.config import ServeConfig
from server.http.routes import SCOPES, Scope
from tests.docker.test_dockerfile import TARGETS, last

DOCKER = Path(__file__).parents[2] / "docker"
TEXT = (DOCKER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = [name for name in SERVICES if "build" in SERVICES[name]]
PROMETHEUS = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())


def mounts(service: str) -> dict[str, str]:
    """Where in the container -> what of it."""
    pairs = [entry.split(":") for entry in SERVICES[service].get("volumes", [])]
    return {pair[1]: pair[0] for pair in pairs}


@pytest.mark.parametrize("path", sorted(DOCKER.rglob("*.*")), ids=lambda path: path.name)
def test_every_file_can_be_parsed(path: Path) -> None:
    parse = {".json": json.loads, ".yml": yaml.safe_load, ".yaml": yaml.safe_load}[path.suffix]
    assert parse(path.read_text())


def test_each_image_has_a_service_in_a_profile_of_its_own() -> None:
    assert {SERVICES[name]["build"]["target"] for name in SERVERS} == set(TARGETS)
    assert len({tuple(SERVICES[name]["profiles"]) for name in SERVERS}) == len(SERVERS)


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_service_mounts_exists(service: str) -> None:
    for source in mounts(service).values():
        if source.startswith("."):
            assert (DOCKER / source).exists()
        else:
            assert source in COMPOSE["volumes"]
    if service in SERVERS:
        assert (DOCKER / SERVICES[service]["build"]["context"] / "Dockerfile").is_file()


@pytest.mark.parametrize("service", SERVICES)
def test_images_of_others_are_pinned_to_a_release(service: str) -> None:
    if service not in SERVERS:
        assert re.search(r":v?\d+\.\d+\.\d+$", SERVICES[service]["image"])


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_published_on_loopback_only(service: str) -> None:
    assert SERVICES[service]["ports"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service]["ports"])


@pytest.mark.parametrize("service", SERVERS)
def test_a_server_writes_to_its_volumes_and_tmp_alone(service: str) -> None:
    volumes = set(json.loads(last(SERVICES[service]["build"]["target"], "VOLUME")))
    assert SERVICES[service]["read_only"] is True
    assert set(mounts(service)) == volumes
    assert [entry.split(":")[0] for entry in SERVICES[service]["tmpfs"]] == ["/tmp"]


def test_every_setting_that_is_passed_exists() -> None:
    names = set(re.findall(r"PREFIXD_(\w+)", TEXT))
    assert names
    assert {name.lower() for name in names} <= ServeConfig.model_fields.keys()


@pytest.mark.parametrize("key", ["PREFIXD_ADMIN_KEY", "PREFIXD_API_KEY"])
@pytest.mark.parametrize("service", SERVERS)
def test_without_a_key_compose_stops_and_says_which(service: str, key: str) -> None:
    assert SERVICES[service]["environment"][key].startswith(f"${{{key}:?")


@pytest.mark.parametrize("service", SERVERS)
def test_requests_may_finish_before_a_server_is_killed(service: str) -> None:
    assert SERVICES[service]["stop_grace_period"] == "45s"


@pytest.mark.parametrize("service", SERVERS)
def test_prometheus_scrapes_the_server_under_a_name_that_it_has(service: str) -> None:
    [scrape] = PROMETHEUS["scrape_configs"]
    host, port = scrape["static_configs"][0]["targets"][0].split(":")
    assert host in SERVICES[service]["networks"]["default"]["aliases"]
    assert port == last(SERVICES[service]["build"]["target"], "EXPOSE")


def test_prometheus_sends_the_key_that_metrics_asks_for() -> None:
    assert SCOPES["/metrics"] is Scope.METRICS, "which the API key has too"
    [scrape] = PROMETHEUS["scrape_configs"]
    secret = Path(scrape["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets")
    assert secret.name in SERVICES["prometheus"]["secrets"]
    assert COMPOSE["secrets"][secret.name] == {"environment": "PREFIXD_API_KEY"}


def test_prometheus_finds_its_rules_where_they_are_mounted() -> None:
    [pattern] = PROMETHEUS["rule_files"]
    mounted = mounts("prometheus")[f"/etc/prometheus/{Path(pattern).parent}"]
    assert list((DOCKER / mounted).glob(Path(pattern).name))


def test_grafana_finds_its_data_source_and_dashboards() -> None:
    folder = DOCKER / mounts("grafana")["/etc/grafana/provisioning"]
    source = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"][0]
    host, port = source["url"].removeprefix("http://").split(":")
    assert SERVICES[host]["ports"][0].endswith(f":{port}")
    provider = yaml.safe_load((folder / "dashboards/prefixd.yaml").read_text())["providers"][0]
    mounted = mounts("grafana")[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DOCKER / mounted / Path(home).name).is_file()
