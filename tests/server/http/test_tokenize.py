"""The tokenizer over HTTP, as lm-eval and vllm bench ask for it."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from server.errors import EngineOverloaded
from server.http import tokenizing
from tests.server.http.fakes import VOCAB_SIZE, FakeEngine


def test_a_text_is_counted_and_cut_into_tokens(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False}).json()

    assert answer == {"count": 2, "max_model_len": 128, "tokens": [15, 16], "token_strs": None}
    assert engine.special_tokens == [False]
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert engine.special_tokens == [False, True]


def test_the_room_of_a_task_is_what_its_prefix_leaves(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"model": "clerk", "prompt": "hi"}).json()

    assert answer["max_model_len"] == 128 - 5
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        response = client.post(path, json={"model": "nobody", **body})
        assert response.status_code == 404


def test_a_conversation_is_tokenized_as_a_chat_would_be(
    client: TestClient, engine: FakeEngine
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    asked = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    bare = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})
    client.post("/v1/chat/completions", json={"model": "poet", "messages": messages})

    assert tuple(asked) == engine.requests[0].prompt_token_ids
    assert bare.json()["tokens"] == asked[:-1]


def test_the_strings_of_tokens_come_on_request(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}).json()

    assert answer["token_strs"] == ["0", "1"]


def test_tokens_become_their_text_again(client: TestClient) -> None:
    assert client.post("/detokenize", json={"tokens": [15, 0]}).json() == {"prompt": "0</s>"}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_a_bad_field_is_named(
    client: TestClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = client.post(path, json=body)

    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_what_waits_for_the_tokenizer_is_bounded_here_too(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise EngineOverloaded("too many prompts wait")

    monkeypatch.setattr(tokenizing.TokenizerQueue, "room_for", full)

    assert client.post("/tokenize", json={"prompt": "hi"}).status_code == 503


def test_the_info_has_what_lm_eval_reads(client: TestClient, engine: FakeEngine) -> None:
    info = client.get("/tokenizer_info").json()

    assert info == {
        "tokenizer_class": "Fake",
        "bos_token": None,
        "eos_token": "</s>",
        "pad_token": None,
        "unk_token": None,
        "vocab_size": VOCAB_SIZE,
        "chat_template": "{{ messages }}",
    }
