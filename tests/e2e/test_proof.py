"""The whole server, a real model: what does not do here what it did where it was made never becomes a version."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from prefix_store.artifact import Prefix, encode
from server.model.attention import make_attention_backend
from server.model.loader import adopt_model
from server.model.prover import make_probe
from tests.engine_harness import generate_with_transformers, random_prefix
from tests.real_app import ADMIN, TASKS, RealApp, real_app
from tests.tiny_model_dir import save_tiny_model
from tests.tiny_models import tiny_model

QUESTION = [40, 41, 42, 43]
MODEL = adopt_model(tiny_model("llama"), model_id="tiny")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApp]:
    directory = tmp_path_factory.mktemp("proof")
    with real_app(save_tiny_model(directory / "model"), directory / "store") as app:
        yield app


def proved(app: RealApp, seed: int) -> Prefix:
    """A random prefix that carries the probe it passes."""
    prefix = random_prefix(MODEL, 6, seed=seed)
    base = app.serving.base
    update = {
        "probe": make_probe(MODEL, make_attention_backend("reference"), prefix, [5, 6, 7]),
        "k_space": "post_rope",
        "rope_theta": base.rope_theta,
        "base_model": base.as_ref(),
    }
    return Prefix("", prefix.manifest.model_copy(update=update), prefix.keys, prefix.values)


def test_a_prefix_that_does_what_its_maker_saw_is_stored_and_served(app: RealApp) -> None:
    prefix = proved(app, seed=1)
    response = app.put("good", encode(prefix.manifest, prefix.keys, prefix.values))
    assert response.status_code == 201, response.text
    assert response.json()["proof"]["probe"]["max_difference_nats"] < 1e-4
    assert response.json()["unverified"] == []
    expected = generate_with_transformers(tiny_model("llama"), QUESTION, prefix, 12)
    assert app.tokens("good", QUESTION, 12) == expected


def test_a_prefix_whose_layers_were_mixed_up_is_refused_and_the_live_one_stays(
    app: RealApp,
) -> None:
    prefix = proved(app, seed=2)
    app.put("kept", encode(prefix.manifest, prefix.keys, prefix.values))
    before = app.client.get(f"{TASKS}/kept", headers=ADMIN).json()

    refused = app.put("kept", encode(prefix.manifest, prefix.keys[::-1], prefix.values))

    assert refused.status_code == 422
    assert refused.json()["code"] == "proof_failed"
    assert "the probe is not reproduced" in refused.json()["errors"][0]["detail"]
    assert app.client.get(f"{TASKS}/kept", headers=ADMIN).json() == before


def test_trials_beside_running_requests_change_none_of_their_tokens(app: RealApp) -> None:
    prefix = proved(app, seed=3)
    app.put("busy", encode(prefix.manifest, prefix.keys, prefix.values))
    expected = generate_with_transformers(tiny_model("llama"), QUESTION, prefix, 60)
    others = [proved(app, seed=seed) for seed in range(10, 22)]

    def dry_run(other: Prefix) -> Any:
        return app.put("other", encode(other.manifest, other.keys, other.values), dry_run=True)

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(app.tokens, "busy", QUESTION, 60) for _ in range(8)]
        trials = [pool.submit(dry_run, other) for other in others]
        assert all(future.result().status_code == 200 for future in trials)
        assert all(future.result() == expected for future in running)
    assert app.client.get(f"{TASKS}/other", headers=ADMIN).status_code == 404
