"""Log-probabilities as clients read them: lm-eval's columns, OpenAI's lists of tokens."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.http import generation, told
from server.types import GenerationRequest, RequestOutput, TokenLogprob, TokenText
from tests.server.http.fakes import FakeEngine, FakeStream, make_app, words

OUTPUT = (
    TokenLogprob(41, -0.5, ((41, -0.5), (7, -1.5))),
    TokenLogprob(7, -2.0, ((9, -0.25), (8, -1.0))),
)
PROMPT = (TokenLogprob(6, -3.0, ((5, -0.1),)), TokenLogprob(7, -0.2, ((7, -0.2),)))
"""Of the tokens 6 and 7 behind 5; the fake engine's texts of 5, 6, 7, 8, 9, 41 are & ' ( ) * J."""


def script(request: GenerationRequest) -> list[RequestOutput]:
    """Two tokens of each choice, with whatever was asked for."""
    wanted = request.sampling.logprobs is not None
    outputs = []
    for output in words(request, "J", "("):
        number = output.num_output_tokens - 1
        prompt = PROMPT if request.sampling.prompt_logprobs is not None and number == 0 else ()
        outputs.append(
            dataclasses.replace(
                output,
                logprobs=OUTPUT[number : number + 1] if wanted else (),
                prompt_logprobs=prompt,
            )
        )
    return outputs


@pytest.fixture(autouse=True)
def scripted(engine: FakeEngine) -> None:
    engine.script = script


def complete(client: TestClient, **body: Any) -> Any:
    body = {"model": "org/tiny", "prompt": [5, 6, 7], **body}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def chunks(client: TestClient, path: str, **body: Any) -> list[Any]:
    response = client.post(path, json={"model": "org/tiny", "stream": True, **body})
    return [json.loads(e.removeprefix("data: ")) for e in response.text.split("\n\n")[:-2]]


def test_columns_have_an_entry_per_token_and_always_the_token_itself(client: TestClient) -> None:
    (choice,) = complete(client, logprobs=2)

    assert choice["logprobs"] == {
        "tokens": ["J", "("],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"J": -0.5, "(": -1.5}, {"*": -0.25, ")": -1.0, "(": -2.0}],
        "text_offset": [0, 1],
    }


def test_an_echo_begins_with_the_prompt_whose_first_token_has_none(client: TestClient) -> None:
    """lm-eval reads what stands behind a context out of this, and drops the last one."""
    (choice,) = complete(client, logprobs=1, echo=True, max_tokens=1)

    assert choice["text"] == "&'(J("
    assert choice["logprobs"]["tokens"] == ["&", "'", "(", "J", "("]
    assert choice["logprobs"]["token_logprobs"] == [None, -3.0, -0.2, -0.5, -2.0]
    assert choice["logprobs"]["top_logprobs"][:3] == [None, {"&": -0.1, "'": -3.0}, {"(": -0.2}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


def test_no_tokens_beside_an_echo_give_the_prompts_probabilities_alone(client: TestClient) -> None:
    (choice,) = complete(client, logprobs=1, echo=True, max_tokens=0)

    assert choice["logprobs"]["token_logprobs"] == [None, -3.0, -0.2]


def test_every_choice_of_every_prompt_has_its_own(client: TestClient) -> None:
    choices = complete(client, prompt=[[5, 6, 7], [5, 6, 7]], n=2, logprobs=0, echo=True)

    assert len(choices) == 4
    assert all(c["logprobs"] == choices[0]["logprobs"] for c in choices)


@pytest.mark.parametrize("echo", [True, False])
def test_a_streams_columns_join_to_those_of_the_whole(client: TestClient, echo: bool) -> None:
    (whole,) = complete(client, logprobs=2, echo=echo)
    parts = [
        chunk["choices"][0]["logprobs"]
        for chunk in chunks(client, "/v1/completions", prompt=[5, 6, 7], logprobs=2, echo=echo)
    ]

    for column, values in whole["logprobs"].items():
        assert [value for part in parts for value in part[column]] == values


def test_without_being_asked_for_there_are_none(client: TestClient, engine: FakeEngine) -> None:
    assert complete(client)[0]["logprobs"] is None
    assert complete(client, logprobs=False, echo=True)[0]["logprobs"] is None
    assert [r.sampling.prompt_logprobs for r in engine.requests] == [None, None]


def test_tokens_of_one_text_are_told_with_the_greater_probability(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a reader who compares a token with the best one would take it for the best."""
    entry = TokenLogprob(1, -4.0, ((-1, -0.5), (1, -4.0)))
    engine.script = lambda request: [
        dataclasses.replace(output, logprobs=(entry,)) for output in words(request, "x")
    ]
    original = engine.token_text
    monkeypatch.setattr(engine, "token_text", lambda token: original(abs(token)))

    (choice,) = complete(client, logprobs=2)

    assert choice["logprobs"]["top_logprobs"] == [{"bytes:\\xe2": -0.5}]
    assert choice["logprobs"]["token_logprobs"] == [-4.0]


def test_a_special_token_has_no_place_in_the_text(client: TestClient, engine: FakeEngine) -> None:
    entries = (TokenLogprob(0, -1.0), TokenLogprob(41, -1.0))
    engine.script = lambda request: [
        dataclasses.replace(o, logprobs=entries) for o in words(request, "J")
    ]

    assert complete(client, logprobs=0)[0]["logprobs"]["text_offset"] == [0, 0]
    shown = complete(client, logprobs=0, skip_special_tokens=False)[0]["logprobs"]
    assert shown["text_offset"] == [0, 4]


TURNS = [{"role": "user", "content": "hi"}]


def test_a_chats_tokens_have_texts_bytes_and_exactly_so_many_alternatives(
    client: TestClient, engine: FakeEngine
) -> None:
    body = {"model": "org/tiny", "messages": TURNS, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]

    first, second = choice["logprobs"]["content"]
    assert first == {
        "token": "J",
        "logprob": -0.5,
        "bytes": [74],
        "top_logprobs": [
            {"token": "J", "logprob": -0.5, "bytes": [74]},
            {"token": "(", "logprob": -1.5, "bytes": [40]},
        ],
    }
    assert [top["token"] for top in second["top_logprobs"]] == ["*", ")"]
    assert engine.requests[0].sampling.logprobs == 2


def test_a_chats_stream_has_them_beside_their_tokens(client: TestClient) -> None:
    opening, *rest = chunks(client, "/v1/chat/completions", messages=TURNS, logprobs=True)

    assert opening["choices"][0]["logprobs"] is None
    tokens = [c["choices"][0]["logprobs"]["content"] for c in rest]
    assert [[entry["token"] for entry in content] for content in tokens] == [["J"], ["("]]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"logprobs": 21}, "logprobs"),
        ("/v1/completions", {"logprobs": -1}, "logprobs"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"logprobs": "5"}, "logprobs"),
        ("/v1/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": 5}, "logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 5}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ("/v1/completions", {"logit_bias": {"a": 1}}, "logit_bias"),
        ("/v1/completions", {"logit_bias": {"-1": 1}}, "logit_bias"),
        ("/v1/completions", {"logit_bias": {"5": 101}}, "logit_bias"),
        ("/v1/completions", {"logit_bias": {"5": "x"}}, "logit_bias"),
        ("/v1/completions", {"logit_bias": [1]}, "logit_bias"),
        ("/v1/completions", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ("/generate", {"logprobs": 1}, "logprobs"),
    ],
)
def test_a_wish_that_can_not_be_met_is_400(
    client: TestClient, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "org/tiny", "task": "org/tiny", "prompt": "hi", "messages": TURNS, **fields}
    response = client.post(path, json=body)

    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_what_is_told_in_one_answer_is_bounded(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 prompts of 3 tokens, twice, with one alternative: 24 values, and 8 for each token generated."""
    monkeypatch.setattr(told, "MAX_TOLD", 40)
    base = {"prompt": [[5, 6, 7]] * 2, "n": 2, "logprobs": 1, "echo": True, "max_tokens": 2}
    complete(client, **base)

    for more in (
        {"logprobs": 2},
        {"n": 3},
        {"prompt": [[5, 6, 7]] * 3},
        {"max_tokens": 3},
        {"echo": False, "max_tokens": 6},
    ):
        response = client.post("/v1/completions", json={"model": "org/tiny", **base, **more})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "logprobs")
    assert len(engine.requests) == 2


def test_where_no_number_of_tokens_was_asked_for_it_is_what_fits(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(told, "MAX_TOLD", 30)
    complete(client, logprobs=2, n=2)
    chat = {"model": "org/tiny", "messages": TURNS, "logprobs": True, "top_logprobs": 2}
    client.post("/v1/chat/completions", json=chat)

    assert [request.sampling.max_tokens for request in engine.requests] == [5, 10]


def test_a_stream_may_tell_of_any_number_of_tokens_and_keeps_none(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(told, "MAX_TOLD", 3)
    kept: list[generation.Choice] = []
    original = generation.Choice.take

    def take(choice: generation.Choice, output: RequestOutput, **how: bool) -> None:
        original(choice, output, **how)
        kept.append(choice)

    monkeypatch.setattr(generation.Choice, "take", take)
    client = TestClient(make_app(engine))
    body = {"prompt": [5, 6, 7], "logprobs": 2, "max_tokens": 9}
    parts = [
        chunk["choices"][0]["logprobs"]["token_logprobs"]
        for chunk in chunks(client, "/v1/completions", **body)
    ]

    assert parts == [[-0.5], [-2.0]]
    assert len(kept) == 2
    assert all(not choice.logprobs for choice in kept)


@pytest.mark.parametrize("limit", [0, 1000])
def test_a_large_answer_is_written_beside_the_event_loop(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(told, "_MAX_WRITTEN_HERE", limit)
    threads: dict[str, int] = {}
    original, submit = engine.token_text, engine.submit

    def token_text(token_id: int) -> TokenText:
        threads["writer"] = threading.get_ident()
        return original(token_id)

    def submitted(request: GenerationRequest) -> FakeStream:
        threads["loop"] = threading.get_ident()
        return submit(request)

    monkeypatch.setattr(engine, "token_text", token_text)
    monkeypatch.setattr(engine, "submit", submitted)
    complete(client, logprobs=2)

    assert (threads["writer"] == threads["loop"]) is (limit > 0)


def test_a_bias_reaches_the_engine_by_token_id(client: TestClient, engine: FakeEngine) -> None:
    complete(client, logit_bias={"5": -100, "6": 2.5})

    assert engine.requests[0].sampling.logit_bias == ((5, -100.0), (6, 2.5))
