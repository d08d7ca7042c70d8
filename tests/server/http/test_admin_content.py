"""History and download: every version with its aliases, its bytes whole or in part, never damaged ones."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.store import PrefixStore
from server.http import admin_content
from server.http.app import create_app
from tests.prefix_store.builders import TINY_BASE, make_artifact
from tests.server.http.fakes import ADMIN, FakeEngine, make_services

VERSIONS = "/admin/v1/tasks/poet/versions"
DATA = make_artifact(seed=1)
DIGEST = hashlib.sha256(DATA)


def get(client: TestClient, path: str, **headers: str) -> Any:
    return client.get(VERSIONS + path, headers=ADMIN | headers)


def test_the_history_says_where_each_alias_points(client: TestClient) -> None:
    answer = get(client, "").json()
    assert [(v["version"], v["aliases"]) for v in answer["data"]] == [(2, ["live"]), (1, [])]


@pytest.mark.parametrize("name", ["1", "v1", f"sha256:{DIGEST.hexdigest()}"])
def test_a_version_is_shown_with_its_manifest(client: TestClient, name: str) -> None:
    response = get(client, f"/{name}")
    assert response.json()["version"] == 1
    assert response.json()["manifest"]["num_virtual_tokens"] == 3


@pytest.mark.parametrize("name", ["9", "v0", "x", "1" * 400, "sha256:abc"])
def test_a_version_that_is_not_there_is_404(client: TestClient, name: str) -> None:
    for path in (f"/{name}", f"/{name}/content"):
        assert get(client, path).status_code == 404


def test_the_bytes_come_back_as_they_were_sent(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_content, "PIECE_BYTES", 100)
    response = get(client, "/v1/content")
    assert response.content == DATA
    assert response.headers["content-length"] == str(len(DATA))
    assert response.headers["etag"] == f'"sha256:{DIGEST.hexdigest()}"'
    assert response.headers["accept-ranges"] == "bytes"
    encoded = base64.b64encode(DIGEST.digest()).decode()
    assert response.headers["repr-digest"] == f"sha-256=:{encoded}:"
    assert "poet-v1.safetensors" in response.headers["content-disposition"]
    assert get(client, "/live/content").content == make_artifact(
        seed=2, generation={"temperature": 0.5, "max_tokens": 7, "stop": ["END"]}
    )


@pytest.mark.parametrize("value", ['"sha256:x", "{}"', "{}", 'W/"{}"', "*"])
def test_who_has_the_bytes_is_told_so(client: TestClient, value: str) -> None:
    etag = f"sha256:{DIGEST.hexdigest()}"
    header = value.format(etag) if '"' in value else value.format(f'"{etag}"')
    response = get(client, "/v1/content", **{"if-none-match": header})
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == f'"{etag}"'


END = len(DATA)


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=5-", 5, END),
        ("bytes=-7", END - 7, END),
        (f"bytes={END - 1}-", END - 1, END),
        ("bytes=10-99999999999", 10, END),
    ],
)
def test_one_range_is_given_alone(client: TestClient, header: str, start: int, stop: int) -> None:
    response = get(client, "/v1/content", range=header)
    assert response.status_code == 206
    assert response.content == DATA[start:stop]
    assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{END}"


@pytest.mark.parametrize("header", [f"bytes={END}-", f"bytes={END + 5}-{END + 9}", "bytes=-0"])
def test_a_range_beyond_the_end_is_416(client: TestClient, header: str) -> None:
    response = get(client, "/v1/content", range=header)
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{END}"


@pytest.mark.parametrize(
    "header", ["bytes=0-1,5-6", "items=0-1", "bytes=-", "bytes=9-3", "bytes=a-b", "bytes=", "x"]
)
def test_what_is_no_single_range_gives_everything(client: TestClient, header: str) -> None:
    response = get(client, "/v1/content", range=header)
    assert (response.status_code, response.content) == (200, DATA)


def test_a_range_of_another_version_gives_everything(client: TestClient) -> None:
    etag = f'"sha256:{DIGEST.hexdigest()}"'
    part = get(client, "/v1/content", range="bytes=0-4", **{"if-range": etag})
    whole = get(client, "/v1/content", range="bytes=0-4", **{"if-range": '"sha256:other"'})
    assert (part.status_code, whole.status_code) == (206, 200)
    assert whole.content == DATA


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damaged_bytes_never_arrive_as_a_whole_file(tmp_path: Path, damage: str) -> None:
    store = PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0)
    store.put("poet", DATA)
    [blob] = (p for p in (tmp_path / "blobs").rglob("*") if p.is_file())
    changed = DATA[:-1] + bytes([DATA[-1] ^ 1]) if damage == "flipped" else DATA[:-1]
    blob.write_bytes(changed)
    app = create_app(make_services(FakeEngine(), store=store))
    client = TestClient(app, raise_server_exceptions=False)
    if damage == "truncated":
        assert get(client, "/v1/content").status_code == 503
    else:
        assert get(client, "/v1/content").content != changed
    store.close()
