"""Dashboard, alerts and docs/operations.md speak of metrics, labels and settings that the server has."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs would be one more dependency

from loadtest.cli_bench import bench
from server.cli_keys import create
from server.config import ServeConfig
from server.metrics import Metrics

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads(
    (ROOT / "docker/grafana/dashboards/prefixd.json").read_text()
)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS: list[dict[str, Any]] = [
    rule
    for path in (ROOT / "docker/prometheus/rules").glob("*.yml")
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
OPERATIONS = (ROOT / "docs/operations.md").read_text()

QUERIES = [
    *((panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]),
    *((note["name"], note["expr"]) for note in DASHBOARD["annotations"]["list"]),
    *((rule["alert"], rule["expr"]) for rule in ALERTS),
]
queries = pytest.mark.parametrize(("where", "query"), QUERIES)

FUNCTIONS = {"rate", "increase", "histogram_quantile", "sum", "min", "max", "vector"}
OPERATORS = {"and", "or", "unless"}
SCRAPE_LABELS = {"job", "instance"}


@dataclass(frozen=True)
class Series:
    """What Prometheus holds of a metric under one name. `labels` None: known at run time only."""

    kind: str
    labels: frozenset[str] | None


def all_series() -> dict[str, Series]:
    registry = Metrics().registry
    found = {"up": Series("gauge", frozenset())}
    for family in registry.collect():
        # The client library has no public way to ask for the labels of a metric without children.
        collector = registry._names_to_collectors.get(family.name)
        labels = frozenset(getattr(collector, "_labelnames", ()))
        match family.type:
            case "counter":
                found[f"{family.name}_total"] = Series("counter", labels)
            case "histogram":
                found[f"{family.name}_bucket"] = Series("histogram", labels | {"le"})
                for part in ("sum", "count"):
                    found[f"{family.name}_{part}"] = Series("histogram", labels)
            case "info":
                found[f"{family.name}_info"] = Series("info", None)
            case _:
                found[family.name] = Series("gauge", labels)
    return found


SERIES = all_series()


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """Each metric of a query with the labels that it is selected by."""
    found = re.findall(r"\b(up|(?:prefixd|process)_\w+)\b(?:\{([^}]*)\})?", query)
    return [(name, set(re.findall(r"(\w+)\s*[=!]", matchers))) for name, matchers in found]


def groupings(query: str) -> set[str]:
    """The labels that a query groups or joins by."""
    lists = re.findall(r"\b(?:by|on|group_left)\s*\(([^)]*)\)", query)
    return {label.strip() for entry in lists for label in entry.split(",") if label.strip()}


@queries
def test_a_query_names_only_what_exists(where: str, query: str) -> None:
    rest = re.sub(r'"[^"]*"', "", query)
    rest = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|group_left)\s*\([^)]*\)", "", rest)
    words = set(re.findall(r"[A-Za-z_]\w*", rest))
    assert words <= SERIES.keys() | FUNCTIONS | OPERATORS


@queries
def test_a_query_uses_labels_that_its_metrics_have(where: str, query: str) -> None:
    known = set(SCRAPE_LABELS)
    for name, used in selectors(query):
        labels = SERIES[name].labels
        assert labels is None or used <= labels | SCRAPE_LABELS
        known |= labels or set()
    assert groupings(query) <= known


@queries
def test_a_rate_is_taken_of_what_only_grows(where: str, query: str) -> None:
    taken = re.findall(r"\b(?:rate|increase)\((\w+)(?:\{[^}]*\})?\[", query)
    assert len(taken) == len(re.findall(r"\b(?:rate|increase)\b", query))
    assert all(SERIES[name].kind in ("counter", "histogram") for name in taken)


@queries
def test_a_counter_is_never_shown_bare(where: str, query: str) -> None:
    used = [name for name, _ in selectors(query) if SERIES[name].kind in ("counter", "histogram")]
    assert len(used) == len(re.findall(r"\b(?:rate|increase)\(", query))


@queries
def test_a_quantile_is_taken_of_buckets(where: str, query: str) -> None:
    for _ in re.findall(r"histogram_quantile", query):
        assert re.search(r"_bucket\b", query)
        assert "le" in groupings(query)


@queries
def test_brackets_are_balanced(where: str, query: str) -> None:
    rest = re.sub(r'"[^"]*"|[^()\[\]{}]', "", query)
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", rest)) != rest:
        rest = shorter
    assert rest == ""


@queries
def test_time_to_first_token_is_never_mixed_over_tasks(where: str, query: str) -> None:
    """Except in the heatmap, which shows the whole distribution and can be set to one task."""
    if "time_to_first_token" in query and where != "Time to first token":
        assert "task" in groupings(query)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_has_a_unit_and_the_chosen_data_source(panel: dict[str, Any]) -> None:
    config = panel["options"]["yAxis"] if panel["type"] == "heatmap" else panel["fieldConfig"]
    assert config.get("unit") or config["defaults"]["unit"]
    for part in (panel, *panel["targets"]):
        assert part["datasource"]["uid"] == "${datasource}"


def test_the_dashboard_has_a_fixed_address_and_asks_for_its_data_source() -> None:
    assert DASHBOARD["uid"] == "prefixd"
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "job", "instance", "task"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    areas = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(area["x"] + area["w"] <= 24 for area in areas)
    for one, two in combinations(areas, 2):
        beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        above = one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"]
        assert beside or above


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_has_a_severity_and_a_sentence(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]


def test_every_alert_has_its_entry_in_the_runbook_and_the_reverse() -> None:
    assert re.findall(r"^### (Prefixd\w+)$", OPERATIONS, re.MULTILINE) == [
        rule["alert"] for rule in ALERTS
    ]


def test_the_table_of_metrics_is_complete_and_true() -> None:
    families = {
        re.sub(r"_(bucket|sum|count)$", "", name) if series.kind == "histogram" else name
        for name, series in SERIES.items()
        if name.startswith("prefixd_")
    }
    assert set(re.findall(r"^\| `(prefixd_\w+)`", OPERATIONS, re.MULTILINE)) == families


def test_metrics_named_in_operations_exist() -> None:
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in SERIES} | SERIES.keys()
    assert set(re.findall(r"\bprefixd_\w+", OPERATIONS)) <= families


def test_settings_named_in_operations_exist() -> None:
    named = re.findall(r"`--(?:no-)?([a-z-]+)", OPERATIONS)
    flags = {flag.replace("-", "_") for flag in named}
    variables = {name.lower() for name in re.findall(r"\bPREFIXD_(\w+)", OPERATIONS)}
    of_others = inspect.signature(bench).parameters.keys() | {"json"}
    of_others |= inspect.signature(create).parameters.keys()
    assert flags
    assert flags - of_others <= ServeConfig.model_fields.keys()
    assert variables <= ServeConfig.model_fields.keys()
