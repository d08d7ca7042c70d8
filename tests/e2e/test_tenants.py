"""Tenants over the real engine: what one of them computed is not there for another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefix_store.key_store import KeyStore
from prefix_store.keys import KeyScope
from tests.real_app import ADMIN, RealApp, real_app
from tests.tiny_model_dir import save_tiny_model

PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RealApp, dict[str, str]]]:
    """A server on a store for which keys were made before it started, and their texts by tenant."""
    directory = tmp_path_factory.mktemp("tenants")
    keys = KeyStore(directory / "store" / "keys")
    infer = frozenset({KeyScope.INFER})
    texts = {tenant: keys.create(tenant, infer).text for tenant in ("acme", "beta")}
    model = save_tiny_model(directory / "model")
    with real_app(model, directory / "store") as app:
        yield app, texts


def num_cached(app: RealApp, key: str, salt: str | None = None) -> int:
    body = {
        "model": app.serving.model.model_id,
        "prompt": PROMPT,
        "max_tokens": 1,
        "temperature": 0,
        "cache_salt": salt,
    }
    answer = app.client.post(
        "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
    )
    assert answer.status_code == 200, answer.text
    cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def test_a_prompt_that_one_tenant_sent_is_computed_anew_for_another(
    served: tuple[RealApp, dict[str, str]],
) -> None:
    app, keys = served

    for salt in (None, "beta~", "shared"):
        for key in (keys["acme"], keys["beta"], ADMIN["authorization"].partition(" ")[2]):
            assert num_cached(app, key, salt) == 0
            assert num_cached(app, key, salt) > 0


def test_keys_that_were_made_beside_the_store_close_inference(
    served: tuple[RealApp, dict[str, str]],
) -> None:
    app, _ = served

    assert app.client.get("/v1/models").status_code == 401
    made = app.client.post(
        "/admin/v1/keys", json={"tenant": "gamma", "scopes": ["infer"]}, headers=ADMIN
    )
    assert made.status_code == 201
    key = made.json()["key"]
    listed = app.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert [model["id"] for model in listed.json()["data"]] == [app.serving.model.model_id]
