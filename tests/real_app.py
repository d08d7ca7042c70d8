"""The whole server in this process: real model, engine thread, store and HTTP app behind a test client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import SecretStr
from starlette.testclient import TestClient
from torch import Tensor

from prefix_store.artifact import Prefix
from server import bootstrap
from server.bootstrap import ServingEngine
from server.config import ServeConfig
from server.engine.messages import ScheduledRow
from server.engine.sequence import Sequence
from server.kvcache.kv_cache import KVCache
from server.model.attention import make_attention_backend
from server.model.attention.base import PagedAttention
from server.model.forward_batch import build_forward_batch
from server.model.loader import LoadedModel
from server.types import GenerationRequest, SamplingParams

ADMIN_KEY = "test-admin-key"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
TASKS = "/admin/v1/tasks"


def packed_logits(model: LoadedModel, prefix: Prefix | None, prompt: list[int]) -> Tensor:
    """Logits [n, V] of the engine's own path at each token of the prompt."""
    cache = KVCache(model.layout, num_blocks=40, block_size=4, device=model.device)
    attention = PagedAttention(make_attention_backend("reference"), cache)
    prefix_blocks: tuple[int, ...] = ()
    if prefix is not None:
        prefix_blocks = tuple(range(20, 20 - (-prefix.manifest.num_virtual_tokens // 4)))
        cache.write_prefix(prefix_blocks, prefix)
    request = GenerationRequest("logits", tuple(prompt), SamplingParams())
    row = ScheduledRow(
        sequence=Sequence(request, index=0, seed=0, arrival=0.0),
        token_ids=tuple(prompt),
        start=0,
        prefix_block_ids=prefix_blocks,
        num_virtual_tokens=prefix.manifest.num_virtual_tokens if prefix else 0,
        first_position=prefix.manifest.first_position if prefix else 0,
        block_ids=tuple(range(1, 19)),
        sample=True,
    )
    batch = build_forward_batch([row], cache)
    with torch.inference_mode(), model.connected(attention):
        attention.begin(batch)
        logits = model.logits(batch.input_ids, batch.position_ids, torch.arange(len(prompt)))
        attention.end()
    return logits


@dataclass(frozen=True)
class RealApp:
    """`client` speaks to the app; `serving` is what stands behind it."""

    client: TestClient
    serving: ServingEngine

    def put(self, task: str, data: bytes, **query: Any) -> Any:
        """The answer to an upload."""
        return self.client.put(f"{TASKS}/{task}", content=data, headers=ADMIN, params=query)

    def tokens(self, task: str, prompt: list[int], count: int) -> list[int]:
        """Greedy tokens through `POST /v1/completions`."""
        body = {
            "model": task,
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    def logits(self, task: str, prompt: list[int]) -> Tensor:
        """Logits [n, V] of a stored task, computed where every forward pass is: on the engine thread."""
        prefix = self.serving.store.load(self.serving.store.resolve(task).digest).prefix
        run, model = self.serving.engine.run, self.serving.model
        portal = self.client.portal
        assert portal is not None, "the app is running"
        logits: Tensor = portal.call(run, lambda: packed_logits(model, prefix, prompt))
        return logits


@contextlib.contextmanager
def real_app(model_dir: Path, store_dir: Path, **settings: Any) -> Iterator[RealApp]:
    """A running server for the model in `model_dir`."""
    config = ServeConfig(
        model=str(model_dir),
        store=store_dir,
        admin_key=SecretStr(ADMIN_KEY),
        num_kv_blocks=64,
        device="cpu",
        **settings,
    )
    application = bootstrap.build(config)
    with TestClient(application.app) as client:
        yield RealApp(client, application.serving)
