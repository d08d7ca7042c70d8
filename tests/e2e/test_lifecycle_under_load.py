"""Versions pushed, promoted, rolled back, tried, evicted, pinned and deleted while clients generate.

On a real server process: every answer has exactly the tokens of the version that it names, nothing fails,
and in the end blocks, host memory and disk are as empty as they were.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from prefix_store.artifact import Prefix, encode
from prefix_store.audit_log import verify
from prefix_store.spec import PrefixManifest, digest_of
from server.engine.tokenizer import Tokenizer
from server.model.loader import adopt_model
from tests.e2e.live_server import ADMIN, LiveServer, live_server
from tests.engine_harness import generate_with_transformers, random_prefix
from tests.tiny_model_dir import save_tiny_model

PROMPT = "the quick brown fox"
NUM_TOKENS = 12
NUM_CLIENTS = 4
NUM_ROUNDS = 60
ALPHA = "/admin/v1/tasks/alpha"


@dataclass
class World:
    """Artifacts by digest, and the tokens that each must give."""

    directory: Path
    artifacts: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def add(self, module: nn.Module, prefix: Prefix, num_tokens: int) -> str:
        manifest = PrefixManifest(
            num_virtual_tokens=prefix.manifest.num_virtual_tokens,
            k_space="post_rope",
            model_type="llama",
        )
        data = encode(manifest, prefix.keys, prefix.values)
        prompt = list(Tokenizer.load(self.directory / "model").encode(PROMPT))
        self.artifacts[digest_of(data)] = data
        self.tokens[digest_of(data)] = generate_with_transformers(
            module, prompt, prefix, num_tokens
        )
        return digest_of(data)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("lifecycle")
    save_tiny_model(directory / "model")
    module: nn.Module = AutoModelForCausalLM.from_pretrained(str(directory / "model")).eval()
    model = adopt_model(module, model_id="tiny")
    made = World(directory)
    for length in (5, 16, 37, 50):
        made.add(module, random_prefix(model, length, seed=length), 200)
    assert len({tuple(tokens[:NUM_TOKENS]) for tokens in made.tokens.values()}) == 4
    return made


def flags(world: World, store: str) -> list[str]:
    """A pool so small that prefixes push each other out, and a host tier for two of them."""
    return [
        "--model", str(world.directory / "model"), "--store", str(world.directory / store),
        "--num-kv-blocks", "40", "--max-num-seqs", "6", "--host-cache-bytes", "64KiB",
    ]  # fmt: skip


@dataclass
class Client:
    """Generates until told to stop; keeps what it got by digest, and what it did not expect."""

    server: LiveServer
    seed: int
    stop: threading.Event
    answers: list[tuple[str, list[int]]] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        rng = random.Random(self.seed)
        names = ["alpha"] * 4 + ["alpha@canary", "alpha@live", "alpha@v1", "beta"]
        with self.server.client() as client:
            while not self.stop.is_set():
                name = rng.choice(names)
                body = {
                    "task": name, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0,
                    "ignore_eos": True, "return_token_ids": True, "user": str(rng.randrange(9)),
                }  # fmt: skip
                try:
                    self._take(name, client.post("/generate", json=body))
                except httpx2.HTTPError as error:
                    self.failures.append(repr(error))

    def _take(self, name: str, response: httpx2.Response) -> None:
        if response.status_code == 404 and name != "beta":
            return  # deleted, or no canary, just now
        if response.status_code != 200:
            self.failures.append(f"{name}: {response.status_code} {response.text}")
            return
        answer = response.json()
        self.names[name] += 1
        self.answers.append((answer["digest"], answer["token_ids"]))


class Operator:
    """Random admin calls; refusals that follow from the state (404, 409) are part of the game."""

    def __init__(self, client: httpx2.Client, world: World) -> None:
        self.client = client
        self.rng = random.Random(5)
        self.artifacts = list(world.artifacts.values())
        self.num_calls = 0
        self.done: Counter[str] = Counter()

    def call(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        response = self.client.request(method, path, headers=ADMIN, **arguments)
        assert response.status_code in (200, 201, 202, 204, 404, 409), response.text
        self.num_calls += 1
        if response.is_success:
            self.done[path.rpartition("/")[2] if path.startswith(ALPHA + "/") else method] += 1
        return response

    def push(self, task: str = "alpha") -> None:
        activate = "true" if self.rng.random() < 0.7 else "false"
        data = self.rng.choice(self.artifacts)
        self.call("PUT", f"/admin/v1/tasks/{task}?activate={activate}", content=data)

    def act(self) -> None:
        version = {"version": self.rng.randint(1, 12)}
        actions: list[Callable[[], object]] = [
            self.push,
            self.push,
            lambda: self.call("PUT", f"{ALPHA}/aliases/live", json=self._existing() or version),
            lambda: self.call(
                "PUT",
                f"{ALPHA}/aliases/canary",
                json={**(self._existing() or version), "weight": 0.5},
            ),
            lambda: self.call("POST", f"{ALPHA}/rollback"),
            lambda: self.call("POST", f"{ALPHA}/evict"),
            lambda: self.call("POST", f"{ALPHA}/warm"),
            lambda: self.call("POST", f"{ALPHA}/pin", json={"ttl_seconds": 0.2}),
            lambda: self.call("POST", f"{ALPHA}/unpin"),
            lambda: self.call("POST", "/admin/v1/tasks/beta/evict"),
        ]
        if self.rng.random() < 0.1:
            self.call("DELETE", ALPHA)
            self.push()
        else:
            self.rng.choice(actions)()

    def _existing(self) -> dict[str, int] | None:
        answer = self.client.get(f"{ALPHA}/versions", headers=ADMIN)
        if not answer.is_success:
            return None
        return {"version": self.rng.choice(answer.json()["data"])["version"]}


def cache(client: httpx2.Client) -> dict[str, Any]:
    answer: dict[str, Any] = client.get("/admin/v1/cache", headers=ADMIN).json()
    return answer


def wait_until_empty(client: httpx2.Client) -> None:
    """Until no tier holds anything: blocks, host memory, disk."""
    deadline = time.monotonic() + 10
    while True:
        tiers = cache(client)
        held = (
            tiers["device"]["blocks_used"],
            tiers["device"]["pinned_blocks"],
            tiers["host"]["bytes"],
            tiers["disk"]["bytes"],
        )
        if held == (0, 0, 0, 0):
            return
        assert time.monotonic() < deadline, f"blocks, pinned blocks, host and disk bytes: {held}"
        time.sleep(0.02)


def try_a_canary(operator: Operator, clients: list[Client]) -> None:
    """Two versions, one of them on trial until some client has asked for it."""
    operator.call("DELETE", ALPHA)
    first, second = (
        operator.call("PUT", ALPHA, content=data).json()["version"]
        for data in operator.artifacts[:2]
    )
    body = {"version": first, "weight": 0.5}
    assert operator.call("PUT", f"{ALPHA}/aliases/canary", json=body).json()["version"] < second
    deadline = time.monotonic() + 10
    while not any(client.names["alpha@canary"] for client in clients):
        assert time.monotonic() < deadline, "no canary was asked"
        time.sleep(0.02)


@pytest.mark.slow
def test_tokens_are_those_of_the_version_that_the_answer_names_whatever_operators_do(
    world: World,
) -> None:
    with live_server(world.directory, *flags(world, "load")) as server, server.client() as admin:
        operator = Operator(admin, world)
        wait_until_empty(admin)
        operator.call("PUT", "/admin/v1/tasks/beta", content=operator.artifacts[0])
        operator.push()
        stop = threading.Event()
        clients = [Client(server, seed, stop) for seed in range(NUM_CLIENTS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        for _ in range(NUM_ROUNDS):
            operator.act()
            time.sleep(0.03)
        try_a_canary(operator, clients)
        stop.set()
        for thread in threads:
            thread.join()
        metrics = server.metrics()
        for task in ("alpha", "beta"):
            operator.call("DELETE", f"/admin/v1/tasks/{task}")
        wait_until_empty(admin)

    assert [failure for client in clients for failure in client.failures] == []
    answers = [answer for client in clients for answer in client.answers]
    for digest, tokens in answers:
        assert tokens == world.tokens[digest][:NUM_TOKENS]
    assert len(answers) >= 50, "too little load to prove anything"
    assert {digest for digest, _ in answers} == set(world.tokens)
    assert 'version_role="canary"' in metrics
    for action in ("PUT", "DELETE", "live", "canary", "rollback", "evict", "pin"):
        assert operator.done[action], f"no {action} happened"
    report = verify(world.directory / "load" / "audit")
    assert (report.ok, report.num_records) == (True, operator.num_calls)


def test_a_stream_of_a_deleted_task_goes_on_and_its_bytes_go_after_it(world: World) -> None:
    digest, data = next(iter(world.artifacts.items()))
    with (
        live_server(world.directory, *flags(world, "deleted")) as server,
        server.client() as client,
        server.client() as admin,
    ):
        assert admin.put(ALPHA, content=data, headers=ADMIN).status_code == 201
        body = {
            "task": "alpha", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": True,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        with client.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()
            streamed = [next(lines)]
            assert admin.delete(ALPHA, headers=ADMIN).status_code == 204
            tiers = cache(admin)
            streamed += lines
            assert response.headers["x-prefixd-digest"] == digest
        assert admin.post("/generate", json=body).status_code == 404
        wait_until_empty(admin)

    assert (tiers["disk"]["num_entries"], tiers["disk"]["entries"]) == (1, [])
    assert [(e["digest"], e["leases"]) for e in tiers["device"]["entries"]] == [(digest, 1)]
    events = [json.loads(line[6:]) for line in streamed if line.startswith("data: {")]
    tokens = [token for event in events for token in event.get("token_ids", ())]
    assert tokens == world.tokens[digest]
