"""Bodies that are not what they should be: always a 4xx that names the place and repeats no text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from server.http import json_body
from tests.server.http.fakes import FakeEngine, make_app

JSON = {"content-type": "application/json"}
SECRET = "my-private-prompt"


def post(client: TestClient, content: bytes, **headers: str) -> tuple[int, dict[str, str]]:
    response = client.post("/v1/completions", content=content, headers=JSON | headers)
    assert SECRET not in response.text
    return response.status_code, response.json()["error"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"", "line 1 column 0"),
        (b"{", "line 1 column 1"),
        (f'{{"model": "poet", "prompt": "{SECRET}" x}}'.encode(), "column"),
        (f'{{"prompt": "{SECRET}'.encode(), "column"),
        (b'{"temperature": NaN}', "column 17"),
        (b'{"prompt": "\\ud800"}', "column"),
        (b'{"prompt": "\xff"}', "column"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "number out of range"),
        (b"[" * 5000, "recursion limit"),
        (b'{"a":' * 5000, "recursion limit"),
        (b'["a"]', "an array"),
        (b'"text"', "a string"),
        (b"null", "null"),
        (b"3", "a number"),
    ],
)
def test_what_is_not_a_json_object_is_refused_by_its_place(
    client: TestClient, content: bytes, place: str
) -> None:
    status, error = post(client, content)

    assert status == 400
    assert error["code"] == "invalid_json"
    assert place in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", 10**400),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", 10**4000),
        ("max_tokens", [1]),
        ("min_tokens", 17),
        ("n", 5),
        ("n", 0),
        ("seed", 2**64),
        ("seed", "1"),
        ("stop", [1]),
        ("stop", ["a"] * 17),
        ("stop", "x" * 129),
        ("stop", ""),
        ("stop", {"a": SECRET}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**40]),
        ("stop_token_ids", list(range(17))),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("stream", "yes"),
        ("ignore_eos", 1),
        ("model", 7),
        ("prompt", 7),
        ("prompt", True),
        ("prompt", {"text": SECRET}),
        ("prompt", [SECRET, 1]),
        ("prompt", [1, SECRET]),
        ("prompt", [[1], SECRET]),
        ("prompt", [[[1]]]),
        ("prompt", [1.5]),
        ("prompt", [-1]),
        ("prompt", [2**31]),
        ("prompt", [10**4000]),
        ("prompt", ["a"] * 65),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [""]),
        ("stream_options", "usage"),
        ("stream_options", {"include_usage": "yes"}),
    ],
)
def test_a_bad_value_is_refused_with_the_name_of_its_field(
    client: TestClient, engine: FakeEngine, field: str, value: object
) -> None:
    body = {"model": "clerk", "prompt": SECRET} | {field: value}

    status, error = post(client, json.dumps(body).encode())

    assert status == 400
    assert error["param"] == field
    assert field in error["message"]
    assert len(error["message"]) < 500
    assert not engine.requests


def test_an_infinity_in_a_number_is_refused(client: TestClient) -> None:
    status, error = post(client, b'{"model": "poet", "prompt": "x", "temperature": 1e999}')

    assert (status, error["param"]) == (400, "temperature")


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_another_content_type_is_415_and_says_what_to_send(client: TestClient, kind: str) -> None:
    response = client.post("/v1/completions", content=b"{}", headers={"content-type": kind})

    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"]
)
def test_any_json_content_type_will_do(client: TestClient, kind: str) -> None:
    body = b'{"model": "poet", "prompt": "x"}'

    assert (
        client.post("/v1/completions", content=body, headers={"content-type": kind}).status_code
        == 200
    )


def test_a_compressed_body_is_415(client: TestClient) -> None:
    assert post(client, b"{}", **{"content-encoding": "gzip"})[0] == 415


def test_a_body_over_the_limit_is_413_announced_or_not() -> None:
    client = TestClient(make_app(FakeEngine(), max_body_bytes=2048))
    big = json.dumps({"model": "poet", "prompt": "x" * 3000}).encode()

    def unannounced() -> Iterator[bytes]:
        yield big[:1500]
        yield big[1500:]

    for content in (big, unannounced()):
        response = client.post("/v1/completions", content=content, headers=JSON)
        assert response.status_code == 413
        assert "2048" in response.json()["error"]["message"]


def test_a_length_with_thousands_of_digits_is_413(client: TestClient) -> None:
    assert post(client, b"{}", **{"content-length": "9" * 4000})[0] == 413


def test_a_body_that_trickles_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "BODY_SECONDS", 0.05)
    app = make_app(FakeEngine())
    sent = []

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]

    assert sent[0]["status"] == 408
