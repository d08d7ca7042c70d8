"""The native route: one prompt, one task, everything we know in the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.http.fakes import FakeEngine, words

BODY = {"task": "poet", "prompt": "hi"}


def test_one_choice_stands_in_the_answer_itself(client: TestClient) -> None:
    answer = client.post("/generate", json=BODY).json()

    assert answer.pop("id").startswith("gen-")
    assert answer.pop("digest").startswith("sha256:")
    assert answer == {
        "task": "poet",
        "version": 2,
        "text": "abc",
        "finish_reason": "length",
        "stop_reason": None,
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prefix_tokens": 3,
            "cached_tokens": 0,
        },
        "prefix_tier": "device",
        "timings": {"queue_seconds": 0.001, "first_token_seconds": 0.002, "total_seconds": 0.003},
    }


def test_several_choices_are_a_list(client: TestClient) -> None:
    answer = client.post("/generate", json={**BODY, "n": 3, "return_token_ids": True}).json()

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["choices"][2]["token_ids"] == [41, 42, 43]
    assert "text" not in answer


def test_a_stream_ends_with_the_summary_and_done(client: TestClient) -> None:
    response = client.post("/generate", json={**BODY, "stream": True, "n": 2})

    *events, done, rest = response.text.split("\n\n")
    deltas = [json.loads(event.removeprefix("data: ")) for event in events]
    assert (done, rest) == ("data: [DONE]", "")
    assert ["usage" in delta for delta in deltas] == [False] * 5 + [True]
    assert "".join(d["text"] for d in deltas if d["index"] == 1) == "abc"
    assert deltas[-1]["usage"]["completion_tokens"] == 6
    assert {delta["task"] for delta in deltas} == {"poet"}


def test_the_base_model_is_named_and_never_assumed(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post("/generate", json={**BODY, "task": "org/tiny"}).json()

    assert (answer["task"], answer["prefix_tier"]) == (None, "none")
    for task in ({}, {"task": None}, {"task": ""}):
        response = client.post("/generate", json={"prompt": "hi"} | task)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "task"
        assert "org/tiny" in response.json()["error"]["message"]
    assert len(engine.requests) == 1


@pytest.mark.parametrize("prompt", [None, "", [], ["a"], [[1]], {"x": 1}, 3])
def test_the_prompt_is_one_text_or_one_list_of_token_ids(client: TestClient, prompt: Any) -> None:
    response = client.post("/generate", json={"task": "poet", "prompt": prompt})

    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_token_ids_and_sampling_fields_reach_the_engine(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: words(request, "ok")

    client.post(
        "/generate", json={"task": "poet@v1", "prompt": [9, 8], "temperature": 0, "seed": 3}
    )

    (request,) = engine.requests
    assert request.prompt_token_ids == (9, 8)
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 3)
    assert request.endpoint == "generate"
    assert request.prefix is not None
    assert request.prefix.version == 1


def test_an_unknown_task_is_404_with_the_field_that_named_it(client: TestClient) -> None:
    response = client.post("/generate", json={"task": "poets", "prompt": "x"})

    assert (response.status_code, response.json()["error"]["param"]) == (404, "task")
    assert "poet" in response.json()["error"]["message"]
