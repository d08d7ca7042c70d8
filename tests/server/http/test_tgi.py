"""TGI's protocol as huggingface_hub and lorax-client read it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.errors import PrefixUnavailable
from server.errors import EngineOverloaded, EngineStopped, GenerationFailed
from server.types import FinishReason, GenerationRequest, RequestOutput, TokenLogprob
from tests.server.http.fakes import FakeEngine, failed, make_app, words

BODY = {"inputs": "hi", "parameters": {"adapter_id": "poet"}}
PATHS = ["/generate", "/generate_stream", "/"]


def body(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "hi", "parameters": {"adapter_id": "poet", **parameters}}


def whole(client: TestClient, **parameters: Any) -> dict[str, Any]:
    response = client.post("/generate", json=body(**parameters))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: TestClient, path: str = "/generate_stream", **parameters: Any) -> list[Any]:
    """The data of each event; there is no `[DONE]`, which lorax-client would take for a token."""
    response = client.post(path, json={**body(**parameters), "stream": True})
    assert response.status_code == 200, response.text
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


def with_logprobs(request: GenerationRequest) -> list[RequestOutput]:
    wanted, prompt = request.sampling.logprobs, request.sampling.prompt_logprobs
    return [
        dataclasses.replace(
            output,
            logprobs=()
            if wanted is None
            else (TokenLogprob(output.token_ids[0], -0.5, ((7, -0.25),) * wanted),),
            prompt_logprobs=()
            if prompt is None or output.num_output_tokens > 1
            else (TokenLogprob(request.prompt_token_ids[1], -3.0),),
        )
        for output in words(request, "a", "b")
    ]


def test_a_whole_answer_is_its_text_and_in_a_list_at_the_root(client: TestClient) -> None:
    assert whole(client) == {"generated_text": "abc"}
    assert client.post("/", json=BODY).json() == [{"generated_text": "abc"}]
    assert whole(client, return_full_text=True) == {"generated_text": "hiabc"}


def test_the_native_body_has_its_native_answer_on_the_same_route(client: TestClient) -> None:
    assert client.post("/generate", json={"task": "poet", "prompt": "hi"}).json()["text"] == "abc"


def test_details_tell_of_every_token(client: TestClient, engine: FakeEngine) -> None:
    engine.script = with_logprobs

    details = whole(client, details=True, top_n_tokens=1, seed=5)["details"]

    assert details == {
        "finish_reason": "length",
        "generated_tokens": 2,
        "input_length": 2,
        "prompt_tokens": 2,
        "skipped_tokens": 0,
        "seed": 5,
        "prefill": [],
        "tokens": [
            {"id": 41, "text": "J", "logprob": -0.5, "special": False, "skipped": False},
            {"id": 42, "text": "K", "logprob": -0.5, "special": False, "skipped": False},
        ],
        "top_tokens": [
            [{"id": 7, "text": "(", "logprob": -0.25, "special": False, "skipped": False}]
        ]
        * 2,
    }


def test_the_prompts_tokens_are_told_on_request(client: TestClient, engine: FakeEngine) -> None:
    engine.script = with_logprobs

    details = whole(client, decoder_input_details=True)["details"]

    assert details["prefill"] == [
        {"id": 15, "text": "0", "logprob": None},
        {"id": 16, "text": "1", "logprob": -3.0},
    ]


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_has_an_event_per_token_and_the_whole_with_the_last(
    client: TestClient, engine: FakeEngine, path: str
) -> None:
    engine.script = with_logprobs

    first, last = stream(client, path, return_full_text=True)

    assert first == {
        "index": 1,
        "token": {"id": 41, "text": "a", "logprob": -0.5, "special": False, "skipped": False},
        "generated_text": None,
        "details": None,
    }
    assert (last["index"], last["token"]["text"], last["generated_text"]) == (2, "b", "hiab")
    assert last["details"]["finish_reason"] == "length"
    assert last["details"]["generated_tokens"] == 2
    assert last["details"]["input_length"] == 2


@pytest.mark.parametrize(
    ("stop_reason", "said"), [("END", "stop_sequence"), (None, "eos_token"), (3, "eos_token")]
)
def test_the_reason_to_end_is_one_of_tgis(
    client: TestClient, engine: FakeEngine, stop_reason: str | int | None, said: str
) -> None:
    engine.script = lambda request: [
        RequestOutput(
            request.request_id, 0, "a", (1,), 1, FinishReason.STOP, stop_reason=stop_reason
        )
    ]

    assert whole(client, details=True)["details"]["finish_reason"] == said
    assert stream(client)[-1]["details"]["finish_reason"] == said


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"temperature": 0.7}, 0.7),
        ({"top_p": 0.9}, 1.0),
        ({"top_p": 1.0}, 0.0),
        ({"top_k": 5}, 1.0),
        ({"do_sample": None, "top_k": None, "top_p": None}, 0.0),
    ],
)
def test_sampling_is_greedy_unless_something_asks_for_chance(
    client: TestClient, engine: FakeEngine, parameters: dict[str, Any], temperature: float
) -> None:
    whole(client, adapter_id="clerk", **parameters)

    assert engine.requests[0].sampling.temperature == temperature


def test_the_tasks_defaults_apply_where_the_request_is_silent(
    client: TestClient, engine: FakeEngine
) -> None:
    whole(client)
    whole(client, adapter_id="clerk")

    values = [(r.sampling.temperature, r.sampling.max_tokens) for r in engine.requests]
    assert values == [(0.5, 7), (0.0, 100)]


def test_parameters_reach_the_engine(client: TestClient, engine: FakeEngine) -> None:
    whole(
        client,
        max_new_tokens=9,
        top_k=3,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        seed=4,
        stop=["x", "y"],
        ignore_eos_token=True,
        truncate=1,
        watermark=True,
    )

    (request,) = engine.requests
    sampling = request.sampling
    assert request.prompt_token_ids == (16,), "the end of the prompt is kept"
    assert (sampling.max_tokens, sampling.top_k, sampling.seed) == (9, 3, 4)
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.2, 0.5)
    assert (sampling.stop, sampling.ignore_eos) == (("x", "y"), True)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (None, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"inputs": "hi"}, "adapter_id: required"),
        ({"inputs": 3, "parameters": {"adapter_id": "poet"}}, "inputs: expected"),
        ({"inputs": "", "parameters": {"adapter_id": "poet"}}, "prompt: expected at least one"),
        ({"inputs": "hi", "parameters": []}, "parameters"),
        (body(temperature="x"), "parameters.temperature: expected"),
        (body(temperature=9), "temperature: expected 0"),
        (body(truncate=0), "parameters.truncate: expected"),
        (body(best_of=2), "best_of: not supported"),
        (body(typical_p=0.9), "typical_p: not supported"),
        (body(grammar={"type": "json"}), "grammar: not supported"),
        (body(top_n_tokens=50, details=True), "logprobs: expected"),
    ],
)
def test_a_bad_field_is_422_validation(
    client: TestClient, path: str, value: dict[str, Any], said: str
) -> None:
    response = client.post(path, json={**value, "stream": True})

    answer = response.json()
    assert (response.status_code, answer["error_type"]) == (422, "validation")
    assert said in answer["error"]


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_adapter_is_404_with_close_names(client: TestClient, path: str) -> None:
    response = client.post(path, json={"inputs": "hi", "parameters": {"adapter_id": "poett"}})

    assert response.status_code == 404
    assert response.json()["error_type"] == "validation"
    assert "close names: poet" in response.json()["error"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (EngineOverloaded("many wait"), 429, "overloaded"),
        (EngineStopped("stopping"), 503, "overloaded"),
        (PrefixUnavailable("gone"), 503, "generation"),
        (GenerationFailed("a bad row"), 424, "generation"),
        (ZeroDivisionError("at 0x7f"), 500, "incomplete_generation"),
    ],
)
def test_an_engine_error_has_tgis_status_and_type(
    path: str, error: Exception, status: int, kind: str
) -> None:
    client = TestClient(make_app(FakeEngine(refusal=error)))

    response = client.post(path, json=BODY)

    assert (response.status_code, response.json()["error_type"]) == (status, kind)
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert "0x7f" not in response.text


def test_an_error_in_a_stream_is_an_event_of_tgis(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [words(request, "a", "b")[0], failed(request, "a bad row")]

    token, problem = stream(client)

    assert token["token"]["text"] == "a"
    assert problem == {"error": "a bad row", "error_type": "generation"}
    assert engine.streams[0].closed


@pytest.mark.parametrize("path", ["/", "/generate_stream", "/info"])
def test_what_never_reaches_the_route_has_tgis_shape_too(path: str) -> None:
    client = TestClient(make_app(FakeEngine(), api_key="the-api-key"))

    refused, wrong_method = client.post(path), client.put(path)
    assert (refused.status_code, refused.json()["error_type"]) == (401, "authentication")
    assert wrong_method.status_code == 401
    key = {"authorization": "Bearer the-api-key"}
    assert client.put(path, headers=key).json()["error_type"] == "validation"
    if path != "/info":
        broken = client.post(path, content=b"{", headers=key | {"content-type": "application/json"})
        assert (broken.status_code, broken.json()["error_type"]) == (422, "validation")
        untyped = client.post(path, content=b"{}", headers=key)
        assert (untyped.status_code, untyped.json()["error_type"]) == (415, "validation")


def test_the_headers_tell_what_answered_and_where_the_time_went(client: TestClient) -> None:
    headers = client.post("/generate", json=BODY).headers

    assert headers["x-prefixd-task"] == headers["x-adapter-id"] == "poet"
    assert headers["x-model-id"] == "org/tiny"
    assert (headers["x-prompt-tokens"], headers["x-generated-tokens"]) == ("2", "3")
    assert headers["x-total-tokens"] == "5"
    assert headers["x-total-time"] == "3.0"
    assert (headers["x-queue-time"], headers["x-inference-time"]) == ("1.0", "2.0")
    base = client.post("/generate", json=body(adapter_id="org/tiny")).headers
    assert "x-adapter-id" not in base


def test_the_info_says_what_serves_here(client: TestClient) -> None:
    info = client.get("/info").json()

    assert info["model_id"] == "org/tiny"
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (127, 128)
    assert info["version"] == "9.9.9"


def test_a_stream_that_is_cut_ends_with_an_error(client: TestClient, engine: FakeEngine) -> None:
    """Without tokens there is no event for the summary; a stream without either would look broken."""
    engine.script = lambda request: [
        words(request, "a", "b")[0],
        RequestOutput(request.request_id, 0, "", (), 1, FinishReason.DEADLINE),
    ]

    token, problem = stream(client)

    assert (token["token"]["text"], token["generated_text"]) == ("a", None)
    assert problem["error_type"] == "incomplete_generation"
    assert "time was over" in problem["error"]


def test_text_that_comes_with_the_end_is_not_dropped_as_special(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [
        RequestOutput(request.request_id, 0, "held", (0,), 1),
        RequestOutput(request.request_id, 0, "", (0,), 2, FinishReason.STOP),
    ]

    assert [event["token"]["special"] for event in stream(client)] == [False, True]


@pytest.mark.parametrize("name", ["org/модель", "org/é", "a\nb"])
def test_a_name_that_no_header_can_hold_is_left_out_of_them(name: str) -> None:
    client = TestClient(make_app(FakeEngine(), model_id=name))
    answer = client.post("/generate", json=BODY)

    assert answer.status_code == 200
    assert "x-model-id" not in answer.headers
