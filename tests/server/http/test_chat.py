"""OpenAI's chats as clients rely on them; each rule here has broken a client elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.http.chat_schemas import MAX_MESSAGES
from server.types import GenerationRequest, RequestOutput
from tests.server.http.fakes import FakeEngine, failed, words

TURN = {"role": "user", "content": "hi"}
BODY = {"model": "poet", "messages": [TURN]}
PATH = "/v1/chat/completions"


def chat(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json=BODY | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: TestClient, **body: Any) -> list[Any]:
    """The data of each event; `[DONE]` must be the last and is left out."""
    response = client.post(PATH, json=BODY | body | {"stream": True})
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refusal(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json=BODY | body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def prompt_of(engine: FakeEngine) -> tuple[int, ...]:
    """The tokens of the last request, as the fake's template and tokenizer make them."""
    return engine.requests[-1].prompt_token_ids


def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(1 + ord(char) % 90 for char in text)


def test_a_whole_answer_has_every_field_that_clients_read(client: TestClient) -> None:
    answer = chat(client)

    assert answer["id"].startswith("chatcmpl-")
    assert isinstance(answer["created"], int)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "poet"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "abc", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["prefixd"]["version"] == 2
    assert answer["system_fingerprint"].startswith("9.9.9-aaaaaaaa-")


def test_the_conversation_is_written_in_the_template_and_asks_for_an_answer(
    client: TestClient, engine: FakeEngine
) -> None:
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None},
        {"role": "user", "content": "c", "name": "me"},
    ]
    chat(client, messages=turns)

    assert prompt_of(engine) == tokens_of("system:be briefuser:a\nbassistant:user:c!")
    assert engine.requests[-1].endpoint == "chat"


def test_without_a_length_an_answer_may_fill_the_context(
    client: TestClient, engine: FakeEngine
) -> None:
    chat(client, model="clerk")
    chat(client, model="clerk", max_tokens=5)
    chat(client, model="clerk", max_tokens=5, max_completion_tokens=6)
    chat(client)  # the task's own default

    room = engine.max_model_len - 5 - len(prompt_of(engine))
    assert [r.sampling.max_tokens for r in engine.requests] == [room, 5, 6, 7]


def test_a_model_without_a_chat_template_says_so(client: TestClient, engine: FakeEngine) -> None:
    engine.has_no_chat_template = True

    for streaming in (True, False):
        error = refusal(client, stream=streaming)
        assert "chat template" in error["message"]
        assert error["param"] == "messages"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "robot", "content": "x"}, "messages.0.role: expected 'developer'"),
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages.0.role: expected"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content: expected a string"),
        ({"role": "user", "content": 3}, "messages.0.content: expected a string"),
        ({"role": "user", "content": {"type": "text"}}, "messages.0.content: expected a string"),
        ({"role": "user", "content": ["x"]}, "messages.0.content.0: expected an object"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0: expected"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content.0.type: only"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tools are not supported"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "tools are not supported"),
        ("hi", "messages.0"),
    ],
)
def test_a_turn_that_can_not_be_written_is_named(client: TestClient, turn: Any, said: str) -> None:
    error = refusal(client, messages=[turn])

    assert said in error["message"]
    assert error["param"] == "messages"


@pytest.mark.parametrize("messages", [None, [], "hi", {}, [TURN] * (MAX_MESSAGES + 1)])
def test_the_conversation_is_a_list_of_bounded_length(client: TestClient, messages: Any) -> None:
    assert refusal(client, messages=messages)["param"] == "messages"


@pytest.mark.parametrize(
    ("field", "neutral", "asking"),
    [
        ("tools", [], [{"type": "function"}]),
        ("tool_choice", "none", "auto"),
        ("functions", [], [{"name": "f"}]),
        ("function_call", "none", "auto"),
        ("chat_template", None, "{{ 7 * 7 }}"),
        ("chat_template_kwargs", {}, {"enable_thinking": False}),
        ("modalities", ["text"], ["text", "audio"]),
        ("audio", None, {"voice": "x"}),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("add_generation_prompt", True, False),
        ("continue_final_message", False, True),
        ("echo", False, True),
        ("web_search_options", None, {}),
    ],
)
def test_a_known_field_that_is_not_offered_is_refused_unless_it_asks_for_nothing(
    client: TestClient, field: str, neutral: Any, asking: Any
) -> None:
    chat(client, **{field: neutral})

    assert refusal(client, **{field: asking})["param"] == field


def test_nulls_and_unknown_fields_change_nothing(client: TestClient, engine: FakeEngine) -> None:
    names = ["max_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs", "top_logprobs",
             "stream_options", "tools", "tool_choice", "response_format", "user", "logit_bias",
             "parallel_tool_calls", "frequency_penalty", "presence_penalty"]  # fmt: skip
    answers = [chat(client, **dict.fromkeys(names), store=False, metadata={"a": 1}), chat(client)]

    assert answers[0]["choices"] == answers[1]["choices"]
    assert engine.requests[0].sampling == engine.requests[1].sampling


def test_a_stream_begins_with_the_role_and_never_repeats_it(client: TestClient) -> None:
    opening, *chunks = stream(client)

    assert opening["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert {chunk["object"] for chunk in (opening, *chunks)} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"content": "a"},
        {"content": "b"},
        {"content": "c"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all("usage" not in chunk for chunk in chunks)


def test_the_role_is_told_with_the_first_token_and_not_before(
    client: TestClient, engine: FakeEngine
) -> None:
    """Load generators take the first chunk for the first token: it must not come when the request is accepted."""
    engine.script = lambda request: [failed(request, "no token came")]

    response = client.post(PATH, json=BODY | {"stream": True})

    assert response.status_code == 500
    assert "assistant" not in response.text


def test_every_choice_of_a_stream_has_a_beginning_of_its_own(client: TestClient) -> None:
    chunks = stream(client, n=2)

    texts = ["", ""]
    roles = [0, 0]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        roles[choice["index"]] += "role" in choice["delta"]
        texts[choice["index"]] += choice["delta"]["content"]
    assert (texts, roles) == (["abc", "abc"], [1, 1])


def test_the_usage_of_a_stream_is_a_chunk_without_choices(client: TestClient) -> None:
    *chunks, last = stream(client, stream_options={"include_usage": True})

    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert [chunk["usage"] for chunk in chunks] == [None] * 4


def test_continuous_usage_counts_up(client: TestClient) -> None:
    chunks = stream(client, stream_options={"continuous_usage_stats": True})

    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3]


def test_an_error_in_a_stream_is_an_event_and_then_done(
    client: TestClient, engine: FakeEngine
) -> None:
    def script(request: GenerationRequest) -> list[RequestOutput]:
        return [words(request, "a", "b")[0], failed(request, "a bad row")]

    engine.script = script
    *_, chunk, problem = stream(client)

    assert chunk["choices"][0]["delta"] == {"content": "a"}
    assert problem["error"]["message"] == "a bad row"
    assert engine.streams[0].closed


def test_an_unknown_task_is_404_and_a_missing_one_400(client: TestClient) -> None:
    response = client.post(PATH, json=BODY | {"model": "poett"})

    assert response.status_code == 404
    assert "close names: poet" in response.json()["error"]["message"]
    assert refusal(client, model=None)["param"] == "model"


def test_the_headers_say_what_answered(client: TestClient) -> None:
    for body in (BODY, BODY | {"stream": True}):
        response = client.post(PATH, json=body)
        assert response.headers["x-prefixd-task"] == "poet"
        assert response.headers["x-prefixd-fingerprint"].startswith("9.9.9-aaaaaaaa-")


def test_token_ids_come_with_each_increment_if_asked_for(client: TestClient) -> None:
    assert chat(client, return_token_ids=True)["choices"][0]["token_ids"] == [41, 42, 43]
    _, *chunks = stream(client, return_token_ids=True)
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[41], [42], [43]]
