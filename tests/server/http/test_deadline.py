"""A request's own deadline, over HTTP: what is read, what is refused, and what clients see when it comes."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from server.errors import EngineOverloaded
from server.http.deadline import HEADER
from server.types import FinishReason, GenerationRequest, RequestOutput
from tests.server.http.fakes import FakeEngine, make_app, words

BODY = {"model": "poet", "task": "poet", "prompt": "x"}
PATHS = pytest.mark.parametrize("path", ["/v1/completions", "/generate"])


def cut(request: GenerationRequest, *texts: str) -> list[RequestOutput]:
    """What the engine gives out of a request whose time is over after these texts."""
    outputs = [replace(o, finish_reason=None) for o in words(request, *texts)] if texts else []
    end = RequestOutput(
        request.request_id, 0, "", (), len(texts), finish_reason=FinishReason.DEADLINE
    )
    return [*outputs, end]


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, 50.0), ("1500", 1.5), ("1", 0.001), ("999999999", 50.0)]
)
def test_the_deadline_counts_from_arrival_and_within_what_the_server_allows(
    header: str | None, seconds: float
) -> None:
    engine = FakeEngine()
    client = TestClient(make_app(engine, max_request_seconds=50.0))
    before = time.monotonic()
    answer = client.post("/generate", json=BODY, headers={HEADER: header} if header else {})

    if seconds > 0.1:
        assert answer.status_code == 200
        deadline = engine.requests[0].deadline
        assert deadline is not None
        assert before + seconds <= deadline <= time.monotonic() + seconds


@pytest.mark.parametrize("header", ["0", "-1", "1.5", "soon", "", "1" * 13, "\u0661".encode()])
def test_a_header_that_is_no_time_is_refused_by_name(
    client: TestClient, engine: FakeEngine, header: str | bytes
) -> None:
    raw = header if isinstance(header, bytes) else header.encode()
    answer = client.post("/v1/completions", json=BODY, headers=[(HEADER.encode(), raw)])

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == HEADER
    assert engine.requests == []


@PATHS
def test_a_cut_answer_ends_as_one_that_was_too_long_and_says_why(
    client: TestClient, engine: FakeEngine, path: str
) -> None:
    """`length` is a word that every client knows."""
    engine.script = lambda request: cut(request, "a", "b")
    answer = client.post(path, json=BODY)

    assert answer.status_code == 200
    choice = answer.json().get("choices", [answer.json()])[0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["stop_reason"] == "deadline"


@PATHS
def test_a_cut_stream_ends_whole(client: TestClient, engine: FakeEngine, path: str) -> None:
    engine.script = lambda request: cut(request, "a", "b")
    answer = client.post(path, json={**BODY, "stream": True})

    events = answer.text.strip().split("\n\n")
    last = json.loads(events[-2].removeprefix("data: "))
    choice = last.get("choices", [last])[0]
    assert events[-1] == "data: [DONE]"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")


@PATHS
@pytest.mark.parametrize("streaming", [True, False])
def test_a_request_whose_time_is_over_before_its_first_token_is_a_504_that_is_not_worth_repeating(
    client: TestClient, engine: FakeEngine, path: str, streaming: bool
) -> None:
    engine.script = cut
    answer = client.post(path, json={**BODY, "stream": streaming})

    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    assert engine.streams[0].closed


@pytest.mark.parametrize("streaming", [True, False])
def test_a_choice_without_its_prompts_probabilities_is_a_504_though_others_have_theirs(
    client: TestClient, engine: FakeEngine, streaming: bool
) -> None:
    """An evaluation would read a score out of what there is."""

    def half(request: GenerationRequest) -> list[RequestOutput]:
        first, _ = words(request, "a")
        return [first, *(replace(end, index=1) for end in cut(request))]

    engine.script = half
    body = {"model": "poet", "prompt": "x", "n": 2, "stream": streaming}
    answer = client.post("/v1/completions", json={**body, "echo": True, "logprobs": 1})
    without = client.post("/v1/completions", json=body)

    assert "deadline_exceeded" in answer.text
    assert answer.status_code == (200 if streaming else 504)
    assert "deadline_exceeded" not in without.text


@PATHS
def test_a_first_token_that_a_slow_reader_gets_with_the_end_is_an_answer(
    client: TestClient, engine: FakeEngine, path: str
) -> None:
    def joined(request: GenerationRequest) -> list[RequestOutput]:
        first, end = cut(request, "a")
        return [first.followed_by(end)]

    engine.script = joined
    answer = client.post(path, json=BODY)

    assert answer.status_code == 200
    assert answer.json().get("choices", [answer.json()])[0]["text"] == "a"


def test_a_prompt_that_waits_too_long_for_the_tokenizer_is_a_504(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.tokenizer_hangs = True
    answer = client.post("/generate", json=BODY, headers={HEADER: "50"})

    assert answer.status_code == 504
    assert engine.num_tokenizing == 0
    assert (
        'prefixd_admission_rejections_total{reason="deadline"} 1.0' in client.get("/metrics").text
    )


@PATHS
def test_an_overloaded_server_says_when_to_come_back_in_whole_seconds(
    client: TestClient, engine: FakeEngine, path: str
) -> None:
    engine.refusal = EngineOverloaded("6 sequences are waiting")
    answer = client.post(path, json=BODY)

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "overloaded"
    assert int(answer.headers["retry-after"]) >= 1
