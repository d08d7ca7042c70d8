"""The series: complete, bounded, started at zero, gone with their task."""

from __future__ import annotations

import pytest

from prefix_store import StoreStats
from server import metrics as metrics_module
from server.metrics import BASE_TASK, OTHER_TASKS, Metrics
from server.types import PrefixEvent, PrefixTier, RequestStats, RequestTimings, StepStats

METRIC_NAMES = {
    "admin_operations", "admission_rejections", "auth_failures", "batch_distinct_tasks",
    "batch_requests", "batch_tokens", "build", "decode_time_seconds", "generation_tokens",
    "http_request_duration_seconds", "http_requests", "inter_token_latency_seconds",
    "kv_cache_blocks", "kv_cache_usage_ratio", "memory_bytes", "model_load_duration_seconds", "preemptions",
    "prefill_time_seconds", "prefix_cache_bytes", "prefix_cache_capacity_bytes",
    "prefix_cache_entries", "prefix_cache_evictions", "prefix_cache_lookups",
    "prefix_load_duration_seconds", "prefix_load_failures", "prefix_resident", "prompt_cache_blocks",
    "prompt_cache_hit_tokens", "prompt_cache_query_tokens", "prompt_tokens",
    "queue_time_seconds", "ready", "request_duration_seconds", "request_generation_tokens",
    "request_prompt_tokens", "requests", "requests_running", "requests_waiting",
    "step_duration_seconds", "task_version_failures", "task_version_first_token_seconds",
    "task_version_requests", "time_per_output_token_seconds", "time_to_first_token_seconds",
}  # fmt: skip


def request(task: str = "poet", **changes: object) -> RequestStats:
    fields: dict[str, object] = {
        "task": task,
        "endpoint": "completions",
        "outcome": "stop",
        "prefix_tier": PrefixTier.HOST if task else PrefixTier.NONE,
        "num_prompt_tokens": 10,
        "num_output_tokens": 4,
        "timings": RequestTimings(0.1, 0.3, 1.0),
        "inter_token_seconds": (0.1, 0.2, 0.3),
    }
    return RequestStats(**(fields | changes))  # type: ignore[arg-type]


def step(**changes: object) -> StepStats:
    fields: dict[str, object] = {
        "duration_seconds": 0.01,
        "num_prefill_tokens": 30,
        "num_decode_tokens": 2,
        "num_scheduled_requests": 3,
        "num_distinct_tasks": 2,
        "num_preemptions": 0,
        "num_running": 3,
        "num_waiting": 1,
        "num_waiting_for_prefix": 2,
        "num_kv_blocks": 100,
        "num_kv_blocks_used": 40,
        "num_prefix_blocks": 15,
        "num_prompt_cache_blocks": 8,
        "num_idle_prompt_blocks": 5,
        "num_asked_tokens": 40,
        "num_hit_tokens": 16,
        "device_prefix_bytes": 4096,
        "resident_tasks": ("poet",),
    }
    return StepStats(**(fields | changes))  # type: ignore[arg-type]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"prefixd_{name}", labels)


def test_the_list_of_series_is_frozen() -> None:
    names = {
        family.name.removeprefix("prefixd_")
        for family in Metrics().registry.collect()
        if family.name.startswith("prefixd_")
    }

    assert names == METRIC_NAMES


def test_bounded_labels_start_at_zero() -> None:
    metrics = Metrics()

    assert (
        value(metrics, "requests_total", task=BASE_TASK, endpoint="generate", outcome="stop") == 0
    )
    assert value(metrics, "prefix_cache_lookups_total", result="disk") == 0
    assert value(metrics, "prefix_cache_evictions_total", tier="device") == 0
    assert value(metrics, "admission_rejections_total", reason="queue_full") == 0
    assert value(metrics, "auth_failures_total", reason="wrong") == 0


def test_a_finished_request_is_counted_under_its_task() -> None:
    metrics = Metrics()
    metrics.on_request(request())

    assert (
        value(metrics, "requests_total", task="poet", endpoint="completions", outcome="stop") == 1
    )
    assert value(metrics, "prompt_tokens_total", task="poet") == 10
    assert value(metrics, "generation_tokens_total", task="poet") == 4
    assert value(metrics, "prefix_cache_lookups_total", result="host") == 1
    assert value(metrics, "time_to_first_token_seconds_sum", task="poet", prefix="host") == 0.3
    assert value(metrics, "request_duration_seconds_sum", task="poet") == 1.0
    assert value(metrics, "queue_time_seconds_sum") == 0.1
    assert value(metrics, "prefill_time_seconds_sum") == pytest.approx(0.2)
    assert value(metrics, "decode_time_seconds_sum") == pytest.approx(0.7)
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "time_per_output_token_seconds_sum", task="poet") == pytest.approx(0.2)


def test_a_canary_is_counted_beside_the_live_version() -> None:
    metrics = Metrics()
    metrics.on_request(request(version_role="live"))
    metrics.on_request(request(version_role="canary"))
    metrics.on_request(request(version_role="canary", outcome="error"))
    metrics.on_request(request())

    def roles(name: str) -> list[float | None]:
        return [value(metrics, name, task="poet", version_role=r) for r in ("live", "canary")]

    assert roles("task_version_requests_total") == [1, 2]
    assert roles("task_version_failures_total") == [0, 1]
    assert roles("task_version_first_token_seconds_count") == [1, 2]
    metrics.forget_task("poet")
    assert roles("task_version_requests_total") == [None, None]


def test_a_request_that_never_ran_has_no_times() -> None:
    metrics = Metrics()
    metrics.on_request(
        request(outcome="cancelled", timings=RequestTimings(), inter_token_seconds=())
    )

    assert value(metrics, "queue_time_seconds_count") == 0
    assert value(metrics, "request_duration_seconds_count", task="poet") is None


def test_requests_without_a_prefix_are_the_base_task_and_no_lookup() -> None:
    metrics = Metrics()
    metrics.on_request(request(task=""))

    assert value(metrics, "prompt_tokens_total", task=BASE_TASK) == 10
    assert value(metrics, "time_to_first_token_seconds_count", task=BASE_TASK, prefix="none") == 1
    assert all(
        value(metrics, "prefix_cache_lookups_total", result=tier) == 0
        for tier in ("device", "host", "disk")
    )


def test_tasks_beyond_the_bound_share_one_label() -> None:
    metrics = Metrics(max_tasks=2)
    for task in ("a", "b", "c", "d", "a"):
        metrics.on_request(request(task))

    assert value(metrics, "prompt_tokens_total", task="a") == 20
    assert value(metrics, "prompt_tokens_total", task="c") is None
    assert value(metrics, "prompt_tokens_total", task=OTHER_TASKS) == 20


def test_a_deleted_task_takes_its_series_along_and_frees_its_place() -> None:
    metrics = Metrics(max_tasks=1)
    metrics.on_request(request("old"))
    metrics.on_step(step(resident_tasks=("old",)))

    metrics.forget_task("old")
    metrics.on_step(step(resident_tasks=()))
    metrics.on_request(request("new"))

    text = metrics.render()[0].decode()
    assert '"old"' not in text
    assert value(metrics, "prompt_tokens_total", task="new") == 10


@pytest.mark.parametrize("seen", [True, False])
def test_a_deleted_tasks_late_reports_take_no_place(seen: bool) -> None:
    """Its requests run on, and its prefix stays on the device until the last of them has ended."""
    metrics = Metrics(max_tasks=1)
    for number in range(50):
        task = f"task-{number}"
        if seen:
            metrics.on_request(request(task))
        metrics.forget_task(task)
        metrics.on_step(step(resident_tasks=(task,)))
        metrics.on_request(request(task))
        metrics.rejected("queue_full", task, "generate")
    metrics.on_step(step(resident_tasks=()))
    metrics.on_request(request("new"))

    assert '"task-' not in metrics.render()[0].decode()
    assert value(metrics, "prompt_tokens_total", task="new") == 10
    assert value(metrics, "prompt_tokens_total", task=OTHER_TASKS) == 500


def test_a_task_that_is_stored_again_has_series_again() -> None:
    metrics = Metrics(max_tasks=1)
    for _ in range(3):
        metrics.welcome_task("poet")
        metrics.on_request(request("poet"))
        metrics.on_step(step(resident_tasks=("poet",)))
        assert value(metrics, "prompt_tokens_total", task="poet") == 10
        assert value(metrics, "prefix_resident", task="poet") == 1
        metrics.forget_task("poet")


def test_forgotten_names_are_bounded_and_those_still_reported_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_module, "MAX_FORGOTTEN", 3)
    metrics = Metrics(max_tasks=1)
    metrics.forget_task("resident")
    for number in range(10):
        metrics.forget_task(f"task-{number}")
        metrics.on_step(step(resident_tasks=("resident",)))

    assert value(metrics, "prefix_resident", task="resident") is None
    metrics.on_request(request("task-0"))
    assert value(metrics, "prompt_tokens_total", task="task-0") == 10


@pytest.mark.parametrize("name", [BASE_TASK, OTHER_TASKS, "never-seen"])
def test_forgetting_what_is_no_task_changes_nothing(name: str) -> None:
    metrics = Metrics()
    metrics.on_request(request(task=""))

    metrics.forget_task(name)

    assert value(metrics, "prompt_tokens_total", task=BASE_TASK) == 10


def test_a_step_sets_the_gauges() -> None:
    metrics = Metrics()
    metrics.on_step(step())

    assert value(metrics, "requests_running") == 3
    assert value(metrics, "requests_waiting", reason="capacity") == 1
    assert value(metrics, "requests_waiting", reason="prefix_load") == 2
    assert value(metrics, "kv_cache_usage_ratio") == 0.35, "idle prompt blocks count as room"
    states = ("prefix", "request", "prompt_cache", "free")
    assert [value(metrics, "kv_cache_blocks", state=s) for s in states] == [15, 20, 5, 60]
    assert value(metrics, "prompt_cache_blocks") == 8
    assert value(metrics, "prompt_cache_query_tokens_total") == 40
    assert value(metrics, "prompt_cache_hit_tokens_total") == 16
    assert value(metrics, "prefix_cache_bytes", tier="device") == 4096
    assert value(metrics, "batch_tokens_sum") == 32


@pytest.mark.parametrize(
    ("prefill", "decode", "phase"), [(5, 0, "prefill"), (0, 5, "decode"), (5, 5, "mixed")]
)
def test_a_steps_phase_is_what_its_tokens_were(prefill: int, decode: int, phase: str) -> None:
    metrics = Metrics()
    metrics.on_step(step(num_prefill_tokens=prefill, num_decode_tokens=decode))

    assert value(metrics, "step_duration_seconds_count", phase=phase) == 1


def test_a_step_that_ran_nothing_is_no_batch() -> None:
    metrics = Metrics()
    metrics.on_step(step(num_scheduled_requests=0, num_prefill_tokens=0, num_decode_tokens=0))

    assert value(metrics, "batch_requests_count") == 0


def test_only_residents_have_a_residency() -> None:
    metrics = Metrics()
    metrics.on_step(step(resident_tasks=("a", "b")))
    metrics.on_step(step(resident_tasks=("b",)))

    assert value(metrics, "prefix_resident", task="a") is None
    assert value(metrics, "prefix_resident", task="b") == 1


def test_prefix_events_are_counted_by_tier() -> None:
    metrics = Metrics()
    events = (
        PrefixEvent("load", PrefixTier.DISK, "a", "sha256:1", 0.25),
        PrefixEvent("load_failed", PrefixTier.DISK, "a", "sha256:1"),
        PrefixEvent("evict", PrefixTier.DEVICE, "a", "sha256:1"),
    )
    metrics.on_step(step(events=events))

    assert value(metrics, "prefix_load_duration_seconds_sum", source="disk") == 0.25
    assert value(metrics, "prefix_load_failures_total") == 1
    assert value(metrics, "prefix_cache_evictions_total", tier="device") == 1


def test_the_stores_counters_are_not_counted_twice() -> None:
    metrics = Metrics()
    stats = StoreStats(10, 20, 1, 5, 5, 3, 100, 4)

    metrics.render(store=stats)
    metrics.render(store=stats)

    assert value(metrics, "prefix_cache_evictions_total", tier="host") == 3
    assert value(metrics, "prefix_cache_bytes", tier="host") == 10
    assert value(metrics, "prefix_cache_entries", tier="disk") == 4


def test_a_rejected_request_is_counted_twice_once_by_reason_and_once_by_outcome() -> None:
    metrics = Metrics()
    metrics.rejected("queue_full", "poet", "generate")

    assert value(metrics, "admission_rejections_total", reason="queue_full") == 1
    assert (
        value(metrics, "requests_total", task="poet", endpoint="generate", outcome="rejected") == 1
    )


def test_what_runs_is_told_once() -> None:
    metrics = Metrics()
    metrics.set_build_info(version="1.2.3", model="tiny")
    metrics.set_ready(True)

    assert value(metrics, "build_info", version="1.2.3", model="tiny") == 1
    assert value(metrics, "ready") == 1
