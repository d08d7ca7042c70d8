"""The model list, as load generators and user interfaces read it."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from tests.prefix_store.builders import TINY_BASE


def test_the_base_model_is_first_and_every_entry_has_its_root(client: TestClient) -> None:
    listing = client.get("/v1/models").json()

    assert listing["object"] == "list"
    assert [entry["id"] for entry in listing["data"]] == ["org/tiny", "clerk", "poet"]
    assert {entry["root"] for entry in listing["data"]} == {"org/tiny"}
    assert [entry["parent"] for entry in listing["data"]] == [None, "org/tiny", "org/tiny"]
    for entry in listing["data"]:
        assert entry["object"] == "model"
        assert isinstance(entry["created"], int)
        assert "name" not in entry, "Open WebUI fails on a null name"


def test_a_tasks_entry_leaves_its_prefix_out_of_the_length(client: TestClient) -> None:
    base, clerk, _ = client.get("/v1/models").json()["data"]

    assert base["max_model_len"] - clerk["max_model_len"] == 5


def test_the_base_models_entry_says_which_token_ids_there_are(client: TestClient) -> None:
    base = client.get("/v1/models").json()["data"][0]
    vocab_size = base["prefixd"]["vocab_size"]

    assert vocab_size == TINY_BASE.vocab_size
    body = {"task": "poet", "prompt": [vocab_size - 1], "max_tokens": 1}
    assert client.post("/generate", json=body).status_code == 200


@pytest.mark.parametrize("name", ["org/tiny", "poet", "poet@v1"])
def test_one_entry_is_found_by_its_id_also_with_a_slash_in_it(
    client: TestClient, name: str
) -> None:
    assert client.get(f"/v1/models/{name}").json()["id"] == name


def test_an_unknown_entry_is_404(client: TestClient) -> None:
    response = client.get("/v1/models/poe")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
