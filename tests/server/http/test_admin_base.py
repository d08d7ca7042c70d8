"""What the server says of its base model is enough to make a prefix that it takes."""

from __future__ import annotations

import torch
from starlette.testclient import TestClient

from prefix_store.artifact import encode
from prefix_store.spec import BaseModelRef, PrefixManifest
from tests.server.http.fakes import ADMIN

BASE = "/admin/v1/base"


def test_a_prefix_made_of_the_answer_alone_is_accepted(client: TestClient) -> None:
    base = client.get(BASE, headers=ADMIN).json()
    rope = base["position_scheme"] == "rope"
    manifest = PrefixManifest(
        num_virtual_tokens=base["max_num_virtual_tokens"],
        k_space="post_rope" if rope else "none",
        model_type=base["model_type"],
        rope_theta=base["rope_theta"],
        base_model=BaseModelRef(**base["base_model"]),
    )
    length, dtype = manifest.num_virtual_tokens, getattr(torch, base["dtype"])
    keys = [
        torch.ones(length, x["num_kv_heads"], x["key_dim"], dtype=dtype) for x in base["layers"]
    ]
    values = [
        torch.ones(length, x["num_kv_heads"], x["value_dim"], dtype=dtype) for x in base["layers"]
    ]
    data = encode(manifest, keys, values)

    answer = client.put("/admin/v1/tasks/made", content=data, headers=ADMIN)

    assert answer.status_code == 201, answer.text
    assert answer.json()["warnings"] == []
    assert sum(x.nbytes for x in (*keys, *values)) == length * base["bytes_per_token"]


def test_the_lengths_are_those_that_the_engine_and_the_store_allow(client: TestClient) -> None:
    base = client.get(BASE, headers=ADMIN).json()

    assert base["id"] == "org/tiny"
    assert base["max_model_len"] == 128
    assert base["max_num_virtual_tokens"] == 16
