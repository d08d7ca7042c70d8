"""PEFT files and prompts through the admin API, around a fake engine: what is recognised and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.backends.memory import MemoryBackend
from prefix_store.store import PrefixStore
from prefix_store.validation import Limits
from server.http.app import create_app
from tests.prefix_store.builders import TINY_BASE, make_artifact
from tests.prefix_store.importers.peft_files import peft_file, prompt
from tests.server.http.fakes import ADMIN, FakeEngine, make_services
from tests.server.http.test_admin import TASKS, content_digest, names, put


@pytest.fixture
def client(engine: FakeEngine) -> TestClient:
    base = replace(TINY_BASE, hidden_size=24, num_attention_heads=6)
    limits = Limits(max_num_virtual_tokens=16)
    store = PrefixStore(MemoryBackend(), base, limits, host_cache_bytes=0)
    return TestClient(create_app(make_services(engine, store=store)))


def compile_task(client: TestClient, task: str, body: dict[str, Any], **headers: str) -> Any:
    return client.post(f"{TASKS}/{task}/compile", json=body, headers=ADMIN | headers)


def test_a_peft_file_is_stored_as_a_native_artifact_and_says_so(client: TestClient) -> None:
    data = peft_file(prompt_embeddings=prompt(3, 32))

    response = put(client, "legal", data, **{"content-digest": content_digest(data)})

    answer = response.json()
    assert response.status_code == 201
    assert answer["recognised"].startswith("PEFT prefix tuning or cartridge")
    assert answer["assumed"][0] == "requests start at position 3, behind the prefix, as PEFT has it"
    assert "base model" in answer["unverified"][0]
    assert answer["digest"] != f"sha256:{content_digest(data)}"
    assert answer["size"] > len(data)
    use = client.post("/v1/completions", json={"model": "legal", "prompt": "x"})
    assert use.json()["prefixd"]["digest"] == answer["digest"]


def test_the_same_peft_file_again_makes_no_version(client: TestClient) -> None:
    data = peft_file(prompt_embeddings=prompt(3, 32))
    put(client, "legal", data)
    again = put(client, "legal", data)
    assert (again.status_code, again.json()["created"]) == (200, False)


def test_a_soft_prompt_is_baked(client: TestClient) -> None:
    answer = put(client, "soft", peft_file(prompt_embeddings=prompt(5, 24))).json()
    assert answer["num_virtual_tokens"] == 5
    assert "soft prompt" in answer["recognised"]


def test_what_is_foreign_obeys_the_same_conditions(client: TestClient) -> None:
    data = peft_file(prompt_embeddings=prompt(3, 32))
    wrong = content_digest(b"other bytes")
    assert put(client, "t", data, **{"content-digest": wrong}).json()["code"] == "digest_mismatch"
    assert put(client, "t", data, **{"if-match": "*"}).status_code == 412
    assert put(client, "t", data, **{"if-none-match": "*"}).status_code == 201
    assert put(client, "t", data, **{"if-none-match": "*"}).status_code == 412


@pytest.mark.parametrize(
    ("data", "query", "status", "code"),
    [
        (peft_file(prompt_embeddings=prompt(3, 31)), {}, 422, "import_refused"),
        (peft_file(prompt_embeddings=prompt(3, 32)), {"peft_type": "LORA"}, 422, "import_refused"),
        (peft_file(prompt_embeddings=prompt(3, 32)), {"task_index": "1"}, 422, "import_refused"),
        (peft_file(prompt_embeddings=prompt(3, 32)), {"task_index": "x"}, 400, "invalid_parameter"),
        (peft_file(prompt_embeddings=prompt(3, 32)) + b"\0", {}, 400, "malformed_artifact"),
        (make_artifact(token_start=0), {"rebase": "true"}, 422, "rebase_refused"),
    ],
)
def test_refusals_have_their_names_and_leave_nothing(
    client: TestClient, data: bytes, query: dict[str, str], status: int, code: str
) -> None:
    response = client.put(f"{TASKS}/t", content=data, headers=ADMIN, params=query)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert names(client) == []


def test_a_prompt_is_compiled_into_a_task(client: TestClient) -> None:
    response = compile_task(client, "brief", {"prompt": "hello"})

    answer = response.json()
    assert response.status_code == 201
    assert answer["num_virtual_tokens"] == 5
    assert answer["recognised"] == "prompt of 5 tokens, baked on the resident model"
    assert "special tokens" in answer["assumed"][0]
    assert answer["unverified"] == answer["warnings"] == []
    assert compile_task(client, "brief", {"prompt": "hello"}).json()["created"] is False


def test_a_conversation_is_compiled_with_the_chat_template(client: TestClient) -> None:
    messages = [{"role": "system", "content": "be brief"}]

    answer = compile_task(client, "brief", {"messages": messages}).json()
    longer = compile_task(client, "brief", {"messages": messages, "add_generation_prompt": True})

    assert answer["num_virtual_tokens"] == len("system:be brief")
    assert longer.json()["num_virtual_tokens"] == answer["num_virtual_tokens"] + 1
    assert "chat template" in answer["assumed"][0]


def test_token_ids_are_compiled_as_they_are(client: TestClient) -> None:
    answer = compile_task(client, "brief", {"prompt": [5, 6, 7]}).json()
    assert (answer["num_virtual_tokens"], answer["assumed"]) == (3, [])


def test_a_model_without_a_chat_template_compiles_no_conversation(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.has_no_chat_template = True
    messages = [{"role": "user", "content": "hi"}]
    response = compile_task(client, "brief", {"messages": messages})
    assert (response.status_code, response.json()["code"]) == (400, "invalid_parameter")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]},
        {"prompt": 5},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "hi", "tool": 1}]},
        {"prompt": "a", "colour": "red"},
    ],
)
def test_a_body_that_asks_for_something_else_is_refused(
    client: TestClient, body: dict[str, Any]
) -> None:
    response = compile_task(client, "brief", body)
    assert (response.status_code, response.json()["code"]) == (400, "invalid_parameter")
    assert names(client) == []


def test_compiling_obeys_preconditions_names_and_the_key(client: TestClient) -> None:
    assert compile_task(client, "t", {"prompt": "a"}, **{"if-match": "*"}).status_code == 412
    assert compile_task(client, "Not A Name", {"prompt": "a"}).status_code == 400
    unkeyed = client.post(f"{TASKS}/t/compile", json={"prompt": "a"})
    assert unkeyed.status_code == 401
