"""Nothing becomes a version that was not tried on the model first; a dry run tells the same and stores nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.audit_log import AuditLog
from prefix_store.errors import ProofFailed
from prefix_store.proof import NO_PROBE, Proof
from prefix_store.spec import digest_of
from server.errors import EngineOverloaded
from server.http.app import create_app
from tests.prefix_store.builders import make_artifact
from tests.server.http.fakes import ADMIN, FakeEngine, FakeProver, make_app, make_services
from tests.server.http.test_admin import TASKS, content_digest, names, put

PROBE = {"input_ids": [1, 2], "top_ids": [5, 6], "top_logprobs": [-0.5, -1.5]}


@pytest.fixture
def prover() -> FakeProver:
    return FakeProver()


@pytest.fixture
def client(engine: FakeEngine, prover: FakeProver) -> TestClient:
    return TestClient(make_app(engine, prover=prover))


def refuse(prover: FakeProver) -> None:
    prover.refusal = ProofFailed.at("/manifest/probe", "the probe is not reproduced")


def test_what_the_trial_showed_is_in_the_answer(client: TestClient, prover: FakeProver) -> None:
    prover.proof = Proof(probe_difference=0.00123456789, probe_tolerance=0.01)
    answer = put(client, "proved", make_artifact(seed=9, probe=PROBE)).json()
    assert answer["unverified"] == []
    assert answer["proof"] == {
        "smoke": "passed",
        "probe": {"max_difference_nats": 0.001235, "tolerance_nats": 0.01},
    }


def test_a_prefix_that_fails_its_trial_is_422_and_stored_nowhere(
    client: TestClient, prover: FakeProver
) -> None:
    refuse(prover)
    before = client.get(f"{TASKS}/poet", headers=ADMIN).json()
    for task in ("fresh", "poet"):
        response = put(client, task, make_artifact(seed=9))
        assert response.status_code == 422
        assert response.json()["code"] == "proof_failed"
        assert response.json()["errors"] == [
            {"pointer": "/manifest/probe", "detail": "the probe is not reproduced"}
        ]
    assert names(client) == ["clerk", "poet"]
    assert client.get(f"{TASKS}/poet", headers=ADMIN).json() == before


def test_a_compiled_prompt_is_tried_too(client: TestClient, prover: FakeProver) -> None:
    body = {"prompt": "answer politely"}
    answer = client.post(f"{TASKS}/new/compile", json=body, headers=ADMIN).json()
    assert prover.tried == [answer["digest"]]
    assert answer["unverified"] == []  # made here: there is no other place it could differ from
    refuse(prover)
    refused = client.post(f"{TASKS}/other/compile", json=body, headers=ADMIN)
    assert refused.status_code == 422
    assert "other" not in names(client)


def test_a_trial_that_finds_no_memory_says_to_come_again(
    client: TestClient, prover: FakeProver
) -> None:
    prover.refusal = EngineOverloaded("not enough device memory")
    response = put(client, "fresh", make_artifact(seed=9))
    assert response.status_code == 503
    assert response.headers["retry-after"]


def test_a_write_that_can_not_hold_is_refused_before_the_trial(
    client: TestClient, prover: FakeProver
) -> None:
    response = put(client, "poet", make_artifact(seed=9), **{"if-none-match": "*"})
    assert response.status_code == 412
    assert prover.tried == []


def dry_run(client: TestClient, task: str, data: bytes, query: str = "", **headers: str) -> Any:
    return client.put(f"{TASKS}/{task}?dry_run=true{query}", content=data, headers=ADMIN | headers)


def test_a_dry_run_tells_what_an_upload_would_and_stores_nothing(client: TestClient) -> None:
    data = make_artifact(seed=9, num_virtual_tokens=4, description="a test")

    response = dry_run(client, "fresh", data, **{"content-digest": content_digest(data)})

    assert response.status_code == 200
    dry = response.json()
    assert names(client) == ["clerk", "poet"]
    wet = put(client, "fresh", data).json()
    assert dry.pop("object") == "dry_run"
    assert dry == {name: wet[name] for name in dry}
    assert dry["digest"] == digest_of(data)
    assert dry["unverified"] == [NO_PROBE]
    assert set(wet) - set(dry) == {"object", "version", "created_at", "created", "activated"}


def test_a_dry_run_refuses_what_an_upload_would(client: TestClient, prover: FakeProver) -> None:
    assert dry_run(client, "fresh", b"junk").status_code == 400
    assert dry_run(client, "fresh", make_artifact(), **{"if-match": "*"}).status_code == 412
    assert dry_run(client, "Not A Name", make_artifact()).status_code == 400
    refuse(prover)
    assert dry_run(client, "fresh", make_artifact()).status_code == 422


def test_a_prompt_can_be_compiled_dry(client: TestClient) -> None:
    response = client.post(
        f"{TASKS}/new/compile?dry_run=true", json={"prompt": "be kind"}, headers=ADMIN
    )
    assert response.json()["object"] == "dry_run"
    assert response.json()["num_virtual_tokens"] == 7
    assert "new" not in names(client)


def test_a_dry_run_is_in_the_audit_log_as_what_it_was(engine: FakeEngine, tmp_path: Path) -> None:
    audit = AuditLog(tmp_path)
    client = TestClient(create_app(make_services(engine, audit=audit)))
    dry_run(client, "fresh", make_artifact(seed=9))
    audit.close()
    [line] = [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    assert '"dry_run":true' in line
