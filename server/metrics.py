"""Every Prometheus series of the server, in one file.

`Metrics` implements `server.engine.observer.EngineObserver`; it and the HTTP layer write on the event
loop, `render` runs in a worker thread (the client library locks each value). Nothing below imports it.

Labels are bounded: a task gets series of its own while there are fewer than `max_tasks`, later ones share
`_other`; requests without a prefix are `_base`. Names of unknown tasks never get here, and a deleted
task's late reports count as `_other`: they must not take its place back.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

from server.types import PrefixEvent, PrefixTier, RequestStats, StepStats

if TYPE_CHECKING:
    from prefix_store import StoreStats

NAMESPACE: Final = "prefixd"
BASE_TASK: Final = "_base"
OTHER_TASKS: Final = "_other"
MAX_FORGOTTEN: Final = 4096
"""Deleted tasks that are remembered: reports about them come until their last request has ended."""

ENDPOINTS: Final = ("completions", "generate")
OUTCOMES: Final = ("stop", "length", "deadline", "cancelled", "error", "rejected")
AUTH_FAILURES: Final = ("missing", "malformed", "wrong", "expired", "revoked", "scope")
REJECTIONS: Final = ("queue_full", "stopped", "too_long", "deadline")
_ROLE: Final = ("task", "version_role")
_OPENMETRICS: Final = "application/openmetrics-text"
_TIERS: Final = tuple(str(tier) for tier in PrefixTier if tier is not PrefixTier.NONE)

_LATENCY: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68,
)  # fmt: skip
_FIRST_TOKEN: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_TOKEN_GAP: Final = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5,
)  # fmt: skip
_STEP: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_LOAD: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_HTTP: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TOKENS: Final = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip
_POWERS: Final = tuple(float(2**k) for k in range(13))


class Metrics:
    """All series, on a registry of their own."""

    def __init__(self, *, max_tasks: int = 200) -> None:
        self.registry = CollectorRegistry()
        self._max_tasks = max_tasks
        self._host_evictions = 0
        self._render_lock = threading.Lock()
        self._tasks = {BASE_TASK, OTHER_TASKS}
        self._forgotten: dict[str, None] = {}  # the least recently reported first
        self._resident: set[str] = set()
        self._residents_shown: tuple[str, ...] | None = None  # None: labels may have changed since
        self._declare_requests()
        self._declare_engine()
        self._declare_prefixes()
        self._declare_http()
        ProcessCollector(registry=self.registry)
        self._create_children()

    # ---- the series ----------------------------------------------------------------------------

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            name, text, labels, namespace=NAMESPACE, registry=self.registry, buckets=buckets
        )

    def _declare_requests(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._requests = counter(
            "requests", "Generation requests by how they ended", "task", "endpoint", "outcome"
        )
        self._duration = histogram(
            "request_duration_seconds", "From submission to the last token", _LATENCY, "task"
        )
        self._first_token = histogram(
            "time_to_first_token_seconds",
            "From submission to the first token, by where the prefix was found",
            _FIRST_TOKEN,
            "task",
            "prefix",
        )
        self._token_gap = histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice", _TOKEN_GAP
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Mean token gap of a request", _TOKEN_GAP, "task"
        )
        self._queue_time = histogram(
            "queue_time_seconds", "From submission to the first step", _LATENCY
        )
        self._prefill_time = histogram(
            "prefill_time_seconds", "From the first step to the first token", _LATENCY
        )
        self._decode_time = histogram(
            "decode_time_seconds", "From the first token to the last", _LATENCY
        )
        self._role_requests = counter(
            "task_version_requests", "Requests by alias, of those that name none", *_ROLE
        )
        self._role_failures = counter(
            "task_version_failures", "Those of them that ended in an error", *_ROLE
        )
        self._role_first_token = histogram(
            "task_version_first_token_seconds", "From submission to first token", _LATENCY, *_ROLE
        )
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens taken in", "task")
        self._output_tokens = counter("generation_tokens", "Tokens generated", "task")
        self._request_prompt = histogram(
            "request_prompt_tokens", "Prompt tokens of a request", _TOKENS
        )
        self._request_output = histogram(
            "request_generation_tokens", "Tokens generated for a request", _TOKENS
        )
        self._rejections = counter(
            "admission_rejections", "Requests refused before they ran", "reason"
        )

    def _declare_engine(self) -> None:
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self._running = gauge("requests_running", "Sequences that decode or prefill")
        self._waiting = gauge("requests_waiting", "Sequences that wait, by what for", "reason")
        self._step_time = histogram("step_duration_seconds", "One engine step", _STEP, "phase")
        self._batch_requests = histogram("batch_requests", "Sequences of a step", _POWERS)
        self._batch_tokens = histogram("batch_tokens", "Tokens of a step", _POWERS)
        self._batch_tasks = histogram("batch_distinct_tasks", "Distinct tasks of a step", _POWERS)
        self._kv_usage = gauge("kv_cache_usage_ratio", "Share of the KV blocks in use, 0 to 1")
        self._kv_blocks = gauge("kv_cache_blocks", "KV blocks by what holds them", "state")
        self._preemptions = counter("preemptions", "Sequences put back to make room")
        self._asked_tokens = counter("prompt_cache_query_tokens", "Tokens of prompts that began")
        self._hit_tokens = counter("prompt_cache_hit_tokens", "Those that were not computed again")
        self._prompt_blocks = gauge("prompt_cache_blocks", "KV blocks held, read now or not")
        self._build = Info("build", "What is running", namespace=NAMESPACE, registry=self.registry)
        self._ready = gauge("ready", "1 while requests are served")
        self._model_load = gauge("model_load_duration_seconds", "Loading the model took this long")
        self._memory = gauge("memory_bytes", "Memory taken or set aside at start, by use", "use")

    def _declare_prefixes(self) -> None:
        counter, gauge = self._counter, self._gauge
        self._tier_bytes = gauge("prefix_cache_bytes", "Bytes of the prefixes held", "tier")
        self._tier_capacity = gauge("prefix_cache_capacity_bytes", "Bytes that fit", "tier")
        self._tier_entries = gauge("prefix_cache_entries", "Prefixes held", "tier")
        self._lookups = counter(
            "prefix_cache_lookups", "Requests by where their prefix was found", "result"
        )
        self._evictions = counter(
            "prefix_cache_evictions", "Prefixes that had to make room", "tier"
        )
        self._load_time = self._histogram(
            "prefix_load_duration_seconds", "Bringing a prefix to host memory", _LOAD, "source"
        )
        self._load_failures = counter("prefix_load_failures", "Prefixes that could not be loaded")
        self._resident_gauge = gauge("prefix_resident", "1 for each task on the device", "task")

    def _declare_http(self) -> None:
        counter, histogram = self._counter, self._histogram
        labels = ("method", "route", "status")
        self._http = counter("http_requests", "HTTP requests answered", *labels)
        self._http_time = histogram(
            "http_request_duration_seconds", "To the end of the answer", _HTTP, "method", "route"
        )
        self._auth = counter("auth_failures", "Requests without the right key", "reason")
        self._admin = counter("admin_operations", "Changes to tasks", "operation", "result")

    def _create_children(self) -> None:
        """Bounded labels start at 0, so that `rate()` sees their first event."""
        for endpoint in ENDPOINTS:
            for outcome in OUTCOMES:
                self._requests.labels(BASE_TASK, endpoint, outcome)
        for reason in REJECTIONS:
            self._rejections.labels(reason)
        for reason in AUTH_FAILURES:
            self._auth.labels(reason)
        for tier in _TIERS:
            self._lookups.labels(tier)
            self._tier_bytes.labels(tier)
            self._tier_entries.labels(tier)
        for tier in ("device", "host"):
            self._evictions.labels(tier)
        for source in ("host", "disk"):
            self._load_time.labels(source)
        for reason in ("capacity", "prefix_load"):
            self._waiting.labels(reason)

    # ---- the engine reports --------------------------------------------------------------------

    def on_step(self, stats: StepStats) -> None:
        """One step of the engine."""
        if stats.num_scheduled_requests:
            self._step_time.labels(_phase(stats)).observe(stats.duration_seconds)
            self._batch_requests.observe(stats.num_scheduled_requests)
            self._batch_tokens.observe(stats.num_prefill_tokens + stats.num_decode_tokens)
            self._batch_tasks.observe(stats.num_distinct_tasks)
        self._preemptions.inc(stats.num_preemptions)
        self._asked_tokens.inc(stats.num_asked_tokens)
        self._hit_tokens.inc(stats.num_hit_tokens)
        self._prompt_blocks.set(stats.num_prompt_cache_blocks)
        self._running.set(stats.num_running)
        self._waiting.labels("capacity").set(stats.num_waiting)
        self._waiting.labels("prefix_load").set(stats.num_waiting_for_prefix)
        self._set_blocks(stats)
        self._set_residents(stats)
        for event in stats.events:
            self._count_prefix_event(event)

    def on_request(self, stats: RequestStats) -> None:
        """One finished request."""
        task = self._task_label(stats.task)
        self._requests.labels(task, stats.endpoint, stats.outcome).inc()
        self._prompt_tokens.labels(task).inc(stats.num_prompt_tokens)
        self._output_tokens.labels(task).inc(stats.num_output_tokens)
        self._request_prompt.observe(stats.num_prompt_tokens)
        self._request_output.observe(stats.num_output_tokens)
        if stats.prefix_tier is not PrefixTier.NONE:
            self._lookups.labels(stats.prefix_tier.value).inc()
        for gap in stats.inter_token_seconds:
            self._token_gap.observe(gap)
        if stats.inter_token_seconds:
            mean = sum(stats.inter_token_seconds) / len(stats.inter_token_seconds)
            self._per_token.labels(task).observe(mean)
        self._observe_timings(stats, task)
        if stats.version_role:
            self._count_role(stats, task, stats.version_role)

    def _count_role(self, stats: RequestStats, task: str, role: str) -> None:
        """What a canary is judged by, beside the live version at the same time."""
        self._role_requests.labels(task, role).inc()
        self._role_failures.labels(task, role).inc(stats.outcome == "error")
        if stats.timings.first_token_seconds is not None:
            self._role_first_token.labels(task, role).observe(stats.timings.first_token_seconds)

    def _observe_timings(self, stats: RequestStats, task: str) -> None:
        queue, first = stats.timings.queue_seconds, stats.timings.first_token_seconds
        finished = stats.timings.finished_seconds
        if queue is not None:
            self._queue_time.observe(queue)
        if first is not None:
            self._first_token.labels(task, stats.prefix_tier.value).observe(first)
            self._prefill_time.observe(max(first - (queue or 0.0), 0.0))
        if finished is not None:
            self._duration.labels(task).observe(finished)
            if first is not None:
                self._decode_time.observe(max(finished - first, 0.0))

    def _set_blocks(self, stats: StepStats) -> None:
        total, idle = stats.num_kv_blocks, stats.num_idle_prompt_blocks
        used = stats.num_kv_blocks_used - idle  # what anybody may have at once is not in use
        self._kv_usage.set(used / total if total else 0.0)
        self._kv_blocks.labels("prefix").set(stats.num_prefix_blocks)
        self._kv_blocks.labels("request").set(used - stats.num_prefix_blocks)
        self._kv_blocks.labels("prompt_cache").set(idle)
        self._kv_blocks.labels("free").set(total - used - idle)

    def _set_residents(self, stats: StepStats) -> None:
        self._tier_bytes.labels("device").set(stats.device_prefix_bytes)
        self._tier_entries.labels("device").set(len(stats.resident_tasks))
        if stats.resident_tasks is self._residents_shown:
            return  # most steps change no residency, and there may be thousands
        self._residents_shown = stats.resident_tasks
        now = {task for task in stats.resident_tasks if self._task_label(task) == task}
        for task in now - self._resident:
            self._resident_gauge.labels(task).set(1)
        for task in self._resident - now:
            self._resident_gauge.remove(task)
        self._resident = now

    def _count_prefix_event(self, event: PrefixEvent) -> None:
        match event.kind:
            case "load":
                self._load_time.labels(event.tier.value).observe(event.seconds)
            case "load_failed":
                self._load_failures.inc()
            case "evict":
                self._evictions.labels(event.tier.value).inc()

    # ---- the HTTP layer reports ----------------------------------------------------------------

    def http_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answer; `route` is the template, never the path that a client sent."""
        self._http.labels(method, route, str(status)).inc()
        self._http_time.labels(method, route).observe(seconds)

    def rejected(self, reason: str, task: str, endpoint: str) -> None:
        """A request that the engine did not take; `reason` is one of `REJECTIONS`."""
        self._rejections.labels(reason).inc()
        self._requests.labels(self._task_label(task), endpoint, "rejected").inc()

    def admin_operation(self, operation: str, result: str) -> None:
        """A change to a task, or a refused one."""
        self._admin.labels(operation, result).inc()

    def auth_failure(self, reason: str) -> None:
        """A request whose key opens nothing, or not its route; `reason` is of `AUTH_FAILURES`."""
        self._auth.labels(reason).inc()

    def welcome_task(self, task: str) -> None:
        """A version of the task was stored: it may have series, also if it was deleted before."""
        self._forgotten.pop(task, None)
        self._residents_shown = None

    def forget_task(self, task: str) -> None:
        """Removes the series of a deleted task; its place goes to the next new one."""
        if task in (BASE_TASK, OTHER_TASKS):
            return
        self._remember_forgotten(task)
        if task not in self._tasks:
            return
        self._tasks.discard(task)
        self._residents_shown = None
        labelled = [self._requests, self._duration, self._first_token, self._per_token]
        labelled += [self._prompt_tokens, self._output_tokens, self._resident_gauge]
        labelled += [self._role_requests, self._role_failures, self._role_first_token]
        for series in labelled:
            series.remove_by_labels({"task": task})
        self._resident.discard(task)

    # ---- start-up and rendering ----------------------------------------------------------------

    def set_build_info(self, **labels: str) -> None:
        """Versions, model, dtype: the labels of `prefixd_build_info`."""
        self._build.info(labels)

    def set_model_load_seconds(self, seconds: float) -> None:
        """How long start-up spent on the model."""
        self._model_load.set(seconds)

    def set_device_capacity(self, num_bytes: int) -> None:
        """Bytes of the KV pool, which is what device prefixes can have at most."""
        self._tier_capacity.labels("device").set(num_bytes)

    def set_memory(self, uses: Mapping[str, int]) -> None:
        """Bytes by use; these are ours, so that their names are bounded."""
        for use, num_bytes in uses.items():
            self._memory.labels(use).set(num_bytes)

    def set_ready(self, ready: bool) -> None:
        """Whether requests are served."""
        self._ready.set(int(ready))

    def render(self, accept: str = "", store: StoreStats | None = None) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics if `accept` asks for it. Blocks briefly.

        `store`: the store's figures of this moment; it keeps its own counters.
        """
        if store is not None:
            with self._render_lock:
                self._take_store_stats(store)
        # Only the kind is taken over: the library fails on versions that are no versions.
        kinds = {part.partition(";")[0].strip() for part in accept.split(",")}
        encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in kinds else "")
        return encode(self.registry), content_type

    def _take_store_stats(self, store: StoreStats) -> None:
        self._tier_bytes.labels("host").set(store.host_bytes)
        self._tier_capacity.labels("host").set(store.host_capacity_bytes)
        self._tier_entries.labels("host").set(store.host_entries)
        self._tier_bytes.labels("disk").set(store.disk_bytes)
        self._tier_entries.labels("disk").set(store.disk_entries)
        self._evictions.labels("host").inc(max(store.host_evictions - self._host_evictions, 0))
        self._host_evictions = store.host_evictions

    def _task_label(self, task: str) -> str:
        """`task` while there is room for it, else `_other`; the empty name is the bare base model."""
        if not task:
            return BASE_TASK
        if task in self._tasks:
            return task
        if task in self._forgotten:
            self._remember_forgotten(task)
            return OTHER_TASKS
        if len(self._tasks) - 2 >= self._max_tasks:
            return OTHER_TASKS
        self._tasks.add(task)
        return task

    def _remember_forgotten(self, task: str) -> None:
        self._forgotten.pop(task, None)
        self._forgotten[task] = None
        if len(self._forgotten) > MAX_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]


def _phase(stats: StepStats) -> str:
    if stats.num_prefill_tokens and stats.num_decode_tokens:
        return "mixed"
    return "prefill" if stats.num_prefill_tokens else "decode"
