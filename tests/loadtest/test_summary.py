"""What is reported of a run that is known in every detail."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.recorder import MAX_REASONS, OTHER, Outcome, Recorder
from loadtest.summary import distribution, summarise, throughput_ratios
from tests.loadtest.runs import answered, traffic_at, unanswered


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(1).exponential(size=501)

    found = distribution(np.append(values, np.nan))

    assert found["count"] == 501
    for percent in (50, 90, 95, 99):
        assert found[f"p{percent}"] == np.percentile(values, percent)
    assert (found["mean"], found["max"]) == (pytest.approx(values.mean()), values.max())


def test_percentiles_of_nothing_are_null() -> None:
    assert distribution(np.array([np.nan])) == {
        "count": 0,
        **dict.fromkeys(("mean", "max", "p50", "p90", "p95", "p99")),
    }


@pytest.fixture
def record() -> Recorder:
    """A window from 1 s to 3 s: a request of the warm-up, and five that count."""
    record = Recorder(traffic_at(0.5, 1.0, 1.5, 2.0, 2.5, 2.9), 1.0, 3.0)
    answered(record, 0, 0.6, 1.2)  # its second token is of the window, its latency is not
    answered(record, 1, 1.1, 1.3, "disk")
    answered(record, 2, 1.9, 2.4, "device")
    unanswered(record, 3, Outcome.REFUSED, "503 overloaded")
    answered(record, 4, 3.5, 4.0, "host")  # answered after the window
    record.sent(5, 2.95)
    record.failed(5, Outcome.UNFINISHED, "connection closed", 9.0)
    return record


def test_latencies_count_from_the_schedule_and_leave_the_warm_up_out(record: Recorder) -> None:
    found = summarise(record, 1, slo_ttft=0.5)

    assert found["ttft"]["count"] == 3
    assert found["ttft"]["max"] == pytest.approx(1.0)
    assert found["ttft"]["p50"] == pytest.approx(0.4)
    assert found["e2e"]["max"] == pytest.approx(1.5)
    assert found["itl"]["count"] == 3
    assert found["generator_lag"]["max"] == pytest.approx(0.05)


def test_throughput_is_what_arrived_within_the_window(record: Recorder) -> None:
    found = summarise(record, 1, None)

    assert found["output_tokens_per_second"] == pytest.approx(5 / 2)
    assert found["requests_per_second"] == pytest.approx(3 / 2)
    assert found["offered_requests_per_second"] == pytest.approx(5 / 2)
    assert record.tokens_per_bin.tolist()[:4] == [1, 4, 1, 0]


def test_each_request_of_the_window_is_counted_once(record: Recorder) -> None:
    found = summarise(record, 1, None)

    assert found["requests"] == {
        "scheduled": 5,
        "pending": 0,
        "unfinished": 1,
        "done": 3,
        "refused": 1,
        "failed": 0,
    }
    assert found["not_done_by_reason"] == {"503 overloaded": 1}


def test_requests_without_a_token_miss_the_objective(record: Recorder) -> None:
    assert summarise(record, 1, slo_ttft=0.5)["slo"]["attained"] == pytest.approx(2 / 5)
    assert "slo" not in summarise(record, 1, None)


def test_cold_and_resident_prefixes_are_told_apart(record: Recorder) -> None:
    found = summarise(record, 1, None)["ttft_by_tier"]

    assert {name: group["count"] for name, group in found.items()} == {
        "resident": 1,
        "cold": 2,
        "host": 1,
        "disk": 1,
    }
    assert found["resident"]["p50"] == pytest.approx(0.4)


def test_a_generator_that_fell_behind_says_so() -> None:
    record = Recorder(traffic_at(0.0), 0.0, 1.0)
    record.sent(0, 0.6)
    record.tokens(0, 2, None, 0.7)
    record.done(0, "device", 0.7)

    found = summarise(record, 1, None)

    assert "by up to 0.60 s" in found["warnings"][0]
    assert found["ttft"]["max"] == pytest.approx(0.7), "from the schedule, not from the sending"


def test_reasons_are_bounded_in_number() -> None:
    count = MAX_REASONS + 20
    record = Recorder(traffic_at(*np.zeros(count).tolist()), 0.0, 1.0)
    for index in range(count):
        unanswered(record, index, Outcome.FAILED, f"400 {index}")

    assert len(record.reasons) == MAX_REASONS + 1
    assert record.reasons[OTHER] == 20


def test_throughput_is_compared_with_five_tasks_or_with_the_fewest() -> None:
    def runs(*tasks: int) -> list[dict[str, float]]:
        return [{"tasks": n, "output_tokens_per_second": 100.0 - n} for n in tasks]

    assert throughput_ratios(runs(1, 5, 10)) == {1: 99 / 95, 5: 1.0, 10: 90 / 95}
    assert throughput_ratios(runs(10, 1)) == {10: 90 / 99, 1: 1.0}
    assert throughput_ratios([{"tasks": 1, "output_tokens_per_second": 0.0}]) == {1: None}
