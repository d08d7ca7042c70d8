"""OpenAI's completions as clients rely on them; each rule here has broken a client elsewhere."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.errors import ContextTooLong, EngineStopped
from server.types import FinishReason, GenerationRequest, RequestOutput
from tests.server.http.fakes import FakeEngine, failed, make_app, words

BODY = {"model": "poet", "prompt": "hi"}


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=BODY | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: TestClient, **body: Any) -> list[Any]:
    """The data of each event; `[DONE]` must be the last and is left out."""
    response = client.post("/v1/completions", json=BODY | body | {"stream": True})
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_whole_answer_has_every_field_that_clients_read(client: TestClient) -> None:
    answer = complete(client)

    digest = answer["prefixd"]["digest"]
    assert answer["id"].startswith("cmpl-")
    assert isinstance(answer["created"], int)
    assert {key: answer[key] for key in ("object", "model", "choices", "usage", "prefixd")} == {
        "object": "text_completion",
        "model": "poet",
        "choices": [
            {
                "index": 0,
                "text": "abc",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,  # the user's, without the prefix
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0, "prefix_tokens": 3},
        },
        "prefixd": {"task": "poet", "version": 2, "digest": digest},
    }
    assert answer["system_fingerprint"] == f"9.9.9-aaaaaaaa-{digest[7:15]}"


def test_the_headers_say_which_prefix_answered(client: TestClient) -> None:
    whole = client.post("/v1/completions", json=BODY)
    streamed = client.post("/v1/completions", json={**BODY, "stream": True})

    for response in (whole, streamed):
        assert response.headers["x-prefixd-task"] == "poet"
        assert response.headers["x-prefixd-version"] == "2"
        assert response.headers["x-prefixd-digest"] == whole.json()["prefixd"]["digest"]
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["cache-control"] == "no-cache"
    assert streamed.headers["x-accel-buffering"] == "no"
    assert "content-length" not in streamed.headers


def test_a_header_says_which_build_answered_also_for_the_base_model(client: TestClient) -> None:
    task = client.post("/v1/completions", json=BODY)
    base = client.post("/v1/completions", json={**BODY, "model": "org/tiny"})

    assert task.headers["x-prefixd-fingerprint"] == task.json()["system_fingerprint"]
    assert base.headers["x-prefixd-fingerprint"] == "9.9.9-aaaaaaaa-base"
    assert "x-prefixd-task" not in base.headers


def test_the_base_model_answers_without_a_prefix(client: TestClient, engine: FakeEngine) -> None:
    answer = complete(client, model="org/tiny")

    assert engine.requests[0].prefix is None
    assert answer["prefixd"] == {"task": None, "version": None, "digest": None}
    assert answer["system_fingerprint"].endswith("-base")
    assert answer["usage"]["prompt_tokens_details"]["prefix_tokens"] == 0


def test_a_name_means_the_live_version_and_a_reference_the_pinned_one(
    client: TestClient, engine: FakeEngine
) -> None:
    live = complete(client)["prefixd"]
    first = complete(client, model="poet@v1")["prefixd"]
    by_digest = complete(client, model=f"poet@{first['digest']}")["prefixd"]

    assert (live["version"], first["version"]) == (2, 1)
    assert by_digest == first
    prefixes = [request.prefix for request in engine.requests]
    assert [(p.digest, p.num_virtual_tokens, p.first_position) for p in prefixes if p] == [
        (live["digest"], 3, 3),
        (first["digest"], 3, 3),
        (first["digest"], 3, 3),
    ]


@pytest.mark.parametrize(
    "name",
    ["pot", "poet@v9", "poet@v", "poet@sha256:00", "Poet!", "../x", "a" * 300, "nobody\u2028"],
)
def test_an_unknown_task_is_404_with_close_names(client: TestClient, name: str) -> None:
    response = client.post("/v1/completions", json={**BODY, "model": name})

    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert len(error["message"]) < 200
    assert ("close names: poet" in error["message"]) == (name in ("pot", "Poet!"))


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}])
def test_a_request_without_a_model_is_400_not_the_base_model(
    client: TestClient, model: dict[str, Any]
) -> None:
    response = client.post("/v1/completions", json={"prompt": "hi"} | model)

    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_token_ids_go_to_the_engine_untouched(client: TestClient, engine: FakeEngine) -> None:
    answer = complete(client, prompt=[5, 6, 7], return_token_ids=True)

    assert engine.requests[0].prompt_token_ids == (5, 6, 7)
    assert answer["choices"][0]["token_ids"] == [41, 42, 43]
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("prompt", [["a", "bc"], [[1], [2, 3]]])
def test_each_prompt_has_n_choices_in_order(
    client: TestClient, engine: FakeEngine, prompt: list[Any]
) -> None:
    engine.script = lambda request: words(request, "x" * len(request.prompt_token_ids))

    answer = complete(client, prompt=prompt, n=2)

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["x", "x", "xx", "xx"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 4
    assert len({request.request_id for request in engine.requests}) == 2


def test_a_list_with_one_prompt_is_one_prompt(client: TestClient) -> None:
    assert len(complete(client, prompt=["hi"])["choices"]) == 1


def test_all_sampling_fields_reach_the_engine(client: TestClient, engine: FakeEngine) -> None:
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 7,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    complete(client, **fields, stop=["A", "B"], stop_token_ids=[3])

    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.stop == ("A", "B")
    assert sampling.stop_token_ids == (3,)


def test_the_tasks_defaults_apply_only_where_the_request_is_silent(
    client: TestClient, engine: FakeEngine
) -> None:
    complete(client)
    complete(client, temperature=0, max_tokens=2, stop=[])
    complete(client, model="clerk")

    values = [(s.temperature, s.max_tokens, s.stop) for s in (r.sampling for r in engine.requests)]
    assert values == [(0.5, 7, ("END",)), (0.0, 2, ()), (1.0, 16, ())]


def test_a_default_length_is_cut_to_what_fits_and_an_explicit_one_is_not(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.max_model_len = 20

    complete(client, model="clerk", prompt="x" * 10)
    complete(client, model="clerk", prompt="x" * 10, max_tokens=16)

    assert [request.sampling.max_tokens for request in engine.requests] == [5, 16]


def test_nulls_mean_absent(client: TestClient, engine: FakeEngine) -> None:
    names = [
        "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "n",
        "stop_token_ids", "ignore_eos", "stream", "stream_options", "return_token_ids", "logprobs",
        "echo", "best_of", "logit_bias", "suffix", "response_format", "tools", "user", "guided_json",
        "repetition_penalty", "presence_penalty", "frequency_penalty", "max_completion_tokens",
    ]  # fmt: skip
    with_nulls = complete(client, **dict.fromkeys(names))

    assert with_nulls["choices"] == complete(client)["choices"]
    assert engine.requests[0].sampling == engine.requests[1].sampling


@pytest.mark.parametrize(
    ("field", "neutral", "asking"),
    [
        ("top_logprobs", 0, 5),
        ("best_of", 1, 2),
        ("suffix", "", "x"),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("tools", [], [{"type": "function"}]),
        ("tool_choice", "none", "auto"),
        ("guided_json", None, {}),
        ("structured_outputs", None, {"choice": ["a"]}),
        ("prompt_logprobs", None, 1),
        ("use_beam_search", False, True),
        ("truncate_prompt_tokens", None, 5),
        ("bad_words", [], ["x"]),
    ],
)
def test_a_known_field_that_is_not_offered_is_refused_unless_it_asks_for_nothing(
    client: TestClient, field: str, neutral: Any, asking: Any
) -> None:
    complete(client, **{field: neutral})
    response = client.post("/v1/completions", json=BODY | {field: asking})

    assert response.status_code == 400, "501 would be retried by OpenAI's client"
    assert response.json()["error"]["param"] == field


def test_best_of_n_out_of_n_chooses_nothing(client: TestClient) -> None:
    assert len(complete(client, n=2, best_of=2)["choices"]) == 2


def test_unknown_fields_are_ignored(client: TestClient) -> None:
    complete(client, user="me", request_id="mine", metadata={"a": 1}, something_new=[1])


def test_the_newer_name_of_max_tokens_works(client: TestClient, engine: FakeEngine) -> None:
    complete(client, max_completion_tokens=5)

    assert engine.requests[0].sampling.max_tokens == 5


def test_a_stream_is_chunks_that_join_to_the_answer(client: TestClient) -> None:
    chunks = stream(client)

    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 0, 0]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "length"]
    assert all("usage" not in chunk for chunk in chunks)


def test_the_usage_of_a_stream_is_a_chunk_of_its_own_and_only_on_request(
    client: TestClient,
) -> None:
    *chunks, last = stream(client, stream_options={"include_usage": True})

    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert all(chunk["choices"] for chunk in chunks)


def test_continuous_usage_counts_up(client: TestClient) -> None:
    chunks = stream(client, stream_options={"continuous_usage_stats": True})

    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]


def test_a_stream_of_several_prompts_and_choices_names_each_chunks_choice(
    client: TestClient,
) -> None:
    chunks = stream(client, prompt=["a", "b"], n=2, return_token_ids=True)

    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        assert len(choice["token_ids"]) == 1
    assert texts == dict.fromkeys(range(4), "abc")


def test_a_stream_is_ascii_so_that_no_reader_splits_it_inside_a_text(
    client: TestClient, engine: FakeEngine
) -> None:
    text = "line\u2028break\u0085\u2029 \x1c \U0001f600 \r\n\n end"
    engine.script = lambda request: words(request, text)

    response = client.post("/v1/completions", json={**BODY, "stream": True})

    assert response.content.isascii()
    first = response.text.split("\n\n")[0]
    assert len(first.splitlines()) == 1
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == text


def test_a_stream_has_no_keep_alive_comments(client: TestClient) -> None:
    response = client.post("/v1/completions", json={**BODY, "stream": True})

    assert not any(line.startswith(":") for line in response.text.splitlines())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineStopped("the engine has died"), "not_ready"),
        (ZeroDivisionError("0x7f"), "internal_error"),
    ],
)
def test_an_error_in_a_stream_is_an_event_and_then_done(
    client: TestClient, engine: FakeEngine, error: Exception, code: str
) -> None:
    engine.script = lambda request: [words(request, "a", "b")[0], error]

    chunk, problem = stream(client)

    assert chunk["choices"][0]["text"] == "a"
    assert problem["error"]["code"] == code
    assert "0x7f" not in json.dumps(problem)
    assert engine.streams[0].closed


def test_a_request_that_fails_in_its_stream_says_why(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [words(request, "a", "b")[0], failed(request, "a bad row")]

    _, problem = stream(client)

    assert problem == {
        "error": {
            "message": "a bad row",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
    }


def test_a_stream_that_fails_before_its_first_token_has_a_status(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [failed(request, "the prefix is damaged")]

    response = client.post("/v1/completions", json={**BODY, "stream": True})

    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the prefix is damaged"
    assert engine.streams[0].closed


def test_a_request_that_the_server_ends_is_worth_repeating(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [
        RequestOutput(request.request_id, 0, "", (), 0, finish_reason=FinishReason.ABORT)
    ]

    response = client.post("/v1/completions", json=BODY)

    assert response.status_code == 503
    assert "retry-after" in response.headers


def test_a_context_too_long_is_400_with_openais_code(engine: FakeEngine) -> None:
    engine.refusal = ContextTooLong("too many tokens", param="prompt")
    client = TestClient(make_app(engine))

    error = client.post("/v1/completions", json={**BODY, "stream": True}).json()["error"]

    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_a_refusal_of_one_prompt_takes_the_others_back(engine: FakeEngine) -> None:
    client = TestClient(make_app(engine))

    response = client.post("/v1/completions", json={**BODY, "prompt": ["a", ""]})

    assert response.status_code == 400
    assert [stream.closed for stream in engine.streams] == [True]


@pytest.mark.parametrize("streaming", [True, False])
def test_every_stream_of_the_engine_is_closed_in_the_end(
    client: TestClient, engine: FakeEngine, streaming: bool
) -> None:
    client.post("/v1/completions", json={**BODY, "prompt": ["a", "b"], "stream": streaming})

    assert [stream.closed for stream in engine.streams] == [True, True]


@pytest.mark.parametrize(("prompt", "said"), [("hi", "hi"), ([5, 6], "&'")])
def test_an_echo_is_the_prompt_before_its_answer(
    client: TestClient, prompt: Any, said: str
) -> None:
    assert complete(client, prompt=prompt, echo=True)["choices"][0]["text"] == f"{said}abc"

    texts = [chunk["choices"][0]["text"] for chunk in stream(client, prompt=prompt, echo=True)]
    assert texts == [f"{said}a", "b", "c"]


def test_each_choice_echoes_its_own_prompt(client: TestClient) -> None:
    choices = complete(client, prompt=["a", "bc"], n=2, echo=True)["choices"]

    assert [choice["text"] for choice in choices] == ["aabc", "aabc", "bcabc", "bcabc"]


def test_no_tokens_beside_an_echo_give_the_prompt_alone(
    client: TestClient, engine: FakeEngine
) -> None:
    """What is asked for is the prompt's tokens and their probabilities; the engine samples one and it is dropped."""
    engine.script = lambda request: words(request, "x")

    answer = complete(client, echo=True, max_tokens=0, return_token_ids=True)

    (choice,) = answer["choices"]
    assert (choice["text"], choice["token_ids"]) == ("hi", [])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert answer["usage"]["completion_tokens"] == 0
    assert engine.requests[0].sampling.max_tokens == 1
    assert client.post("/v1/completions", json={**BODY, "max_tokens": 0}).status_code == 400


def test_an_echo_of_a_token_that_does_not_exist_is_400(client: TestClient) -> None:
    response = client.post("/v1/completions", json={**BODY, "prompt": [10**6], "echo": True})

    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_the_tokenizers_own_tokens_are_left_out_on_request(
    client: TestClient, engine: FakeEngine
) -> None:
    complete(client)
    complete(client, add_special_tokens=False)

    assert engine.special_tokens == [True, False]


def test_a_stop_reason_is_told(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [
        RequestOutput(
            request.request_id, 0, "a", (1,), 1, finish_reason=FinishReason.STOP, stop_reason="END"
        )
    ]

    (choice,) = complete(client)["choices"]

    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")


def test_cached_tokens_are_those_of_each_prompts_first_choice(
    client: TestClient, engine: FakeEngine
) -> None:
    """The other choices find what the first has computed: that is no saving to tell a client of."""

    def script(request: GenerationRequest) -> list[RequestOutput]:
        return [
            dataclasses.replace(output, num_cached_tokens=(1, 64)[output.index])
            for output in words(request, "a")
        ]

    engine.script = script
    answer = client.post("/v1/completions", json={**BODY, "prompt": ["hi", "ho"], "n": 2}).json()

    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


def test_a_cache_salt_reaches_the_engine_and_is_bounded(
    client: TestClient, engine: FakeEngine
) -> None:
    assert client.post("/v1/completions", json={**BODY, "cache_salt": "team-7"}).is_success
    assert client.post("/v1/completions", json={**BODY, "cache_salt": None}).is_success
    assert [request.cache_salt for request in engine.requests] == ["~team-7", "~"]
    assert [request.tenant for request in engine.requests] == ["", ""]

    for salt in ("x" * 129, 7):
        refused = client.post("/v1/completions", json={**BODY, "cache_salt": salt})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "cache_salt"
    body = json.dumps(BODY)[:-1] + ', "cache_salt": "\\ud800"}'
    headers = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=body, headers=headers).status_code == 400
