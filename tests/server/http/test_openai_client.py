"""OpenAI's own client against the app: what it shows its user is what we meant."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from server.types import FinishReason, GenerationRequest, RequestOutput
from tests.server.http.fakes import FakeEngine, failed, make_app, words


@pytest.fixture
def openai_client(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    http = TestClient(make_app(engine, api_key="the-api-key"), base_url="http://testserver")
    with openai.OpenAI(
        base_url="http://testserver/v1/", api_key="the-api-key", http_client=http, max_retries=0
    ) as client:
        yield client


def test_a_completion(openai_client: openai.OpenAI) -> None:
    answer = openai_client.completions.create(model="poet", prompt="hi", max_tokens=3)

    assert answer.choices[0].text == "abc"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    assert answer.system_fingerprint
    assert answer._request_id is not None
    assert answer.id == f"cmpl-{answer._request_id}"


def test_a_stream_with_its_usage(openai_client: openai.OpenAI) -> None:
    chunks = list(
        openai_client.completions.create(
            model="poet", prompt="hi", stream=True, stream_options={"include_usage": True}
        )
    )

    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "abc"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_the_model_list(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["org/tiny", "clerk", "poet"]
    assert openai_client.models.retrieve("poet").id == "poet"


def test_errors_arrive_as_their_classes_with_their_messages(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="close names: poet") as missing:
        openai_client.completions.create(model="poett", prompt="hi")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"

    with pytest.raises(openai.BadRequestError, match="temperature: expected 0"):
        openai_client.completions.create(model="poet", prompt="hi", temperature=9)

    with pytest.raises(openai.AuthenticationError, match="not one of this server"):
        openai_client.with_options(api_key="wrong").models.list()


def test_an_error_in_a_stream_is_raised(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    def script(request: object) -> list[RequestOutput]:
        return [words(engine.requests[-1], "a", "b")[0], failed(engine.requests[-1], "a bad row")]

    engine.script = script
    stream = openai_client.completions.create(model="poet", prompt="hi", stream=True)

    with pytest.raises(openai.APIError, match="a bad row"):
        list(stream)


TURNS: list[Any] = [{"role": "user", "content": "hi"}]


def test_a_chat(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(model="poet", messages=TURNS)

    assert answer.choices[0].message.content == "abc"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert answer.id == f"chatcmpl-{answer._request_id}"


def test_a_chats_stream_and_the_helper_that_puts_it_together(
    openai_client: openai.OpenAI, engine: FakeEngine
) -> None:
    chunks = list(
        openai_client.chat.completions.create(
            model="poet", messages=TURNS, stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "abc"
    assert [delta.role for delta in deltas] == ["assistant", None, None, None]
    assert chunks[-1].usage is not None

    def to_its_end(request: GenerationRequest) -> list[RequestOutput]:
        *outputs, last = words(request, "a", "b", "c")
        return [*outputs, dataclasses.replace(last, finish_reason=FinishReason.STOP)]

    engine.script = to_its_end  # the helper raises for an answer that was cut off
    with openai_client.chat.completions.stream(model="poet", messages=TURNS) as stream:
        told = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion()
    assert "".join(told) == "abc"
    assert whole.choices[0].message.content == "abc"


def test_a_chats_errors(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        openai_client.chat.completions.create(
            model="poet",
            messages=TURNS,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    engine.has_no_chat_template = True
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        openai_client.chat.completions.create(model="poet", messages=TURNS)
