"""The main job on a real server process: upload, generate for many tasks at once, scrape, restart."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from transformers import AutoModelForCausalLM

from prefix_store.artifact import Prefix, encode
from prefix_store.spec import PrefixManifest
from server.engine.tokenizer import Tokenizer
from server.model.loader import adopt_model
from tests.e2e.live_server import ADMIN, LiveServer, live_server
from tests.engine_harness import generate_with_transformers, random_prefix
from tests.tiny_model_dir import save_tiny_model

LENGTHS = {"alpha": 5, "beta": 37, "gamma": 16, "delta": 130}  # what no test replaces
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    save_tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def module(directory: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(str(directory / "model"))
    return model.eval()


@pytest.fixture(scope="module")
def prefixes(module: nn.Module) -> dict[str, Prefix]:
    model = adopt_model(module, model_id="tiny")
    return {task: random_prefix(model, p, seed=p) for task, p in LENGTHS.items()}


@pytest.fixture(scope="module")
def server(directory: Path, prefixes: dict[str, Prefix]) -> Iterator[LiveServer]:
    with live_server(directory, *flags(directory)) as running, running.client() as client:
        for task, prefix in prefixes.items():
            response = client.put(
                f"/admin/v1/tasks/{task}", content=artifact(prefix), headers=ADMIN
            )
            assert response.status_code == 201, response.text
        yield running


def flags(directory: Path) -> tuple[str, ...]:
    return ("--model", str(directory / "model"), "--store", str(directory / "store"))


def artifact(prefix: Prefix) -> bytes:
    manifest = PrefixManifest(
        num_virtual_tokens=prefix.manifest.num_virtual_tokens,
        k_space="post_rope",
        model_type="llama",
    )
    return encode(manifest, prefix.keys, prefix.values)


def expected_tokens(
    directory: Path, module: nn.Module, prefix: Prefix | None, count: int
) -> list[int]:
    prompt = Tokenizer.load(directory / "model").encode(PROMPT)
    return generate_with_transformers(module, list(prompt), prefix, count)


async def _complete(client: openai.AsyncOpenAI, model: str, count: int, stream: bool) -> list[int]:
    extra = {"return_token_ids": True, "ignore_eos": True}
    if not stream:
        answer = await client.completions.create(
            model=model, prompt=PROMPT, max_tokens=count, temperature=0, extra_body=extra
        )
        return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]
    tokens: list[int] = []
    chunks = await client.completions.create(
        model=model, prompt=PROMPT, max_tokens=count, temperature=0, extra_body=extra, stream=True
    )
    async for chunk in chunks:
        tokens += [t for choice in chunk.choices for t in choice.token_ids or ()]  # type: ignore[attr-defined]
    return tokens


def test_openai_clients_of_many_tasks_at_once_get_the_tokens_of_transformers(
    server: LiveServer, directory: Path, module: nn.Module, prefixes: dict[str, Prefix]
) -> None:
    async def everyone() -> list[tuple[str, list[int]]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            jobs = [(m, s) for m in [*prefixes, "model"] for s in (False, True, True)]
            results = await asyncio.gather(*(_complete(client, m, 24, s) for m, s in jobs))
            return [(m, tokens) for (m, _), tokens in zip(jobs, results, strict=True)]

    answers = asyncio.run(everyone())

    expected = {
        name: expected_tokens(directory, module, prefixes.get(name), 24)
        for name in [*prefixes, "model"]
    }
    assert len({tuple(t) for t in expected.values()}) == len(expected)
    assert len(answers) == 15
    for name, tokens in answers:
        assert tokens == expected[name], name


def test_metrics_tell_latency_per_task_and_where_the_prefix_was(server: LiveServer) -> None:
    with server.client() as client:
        for _ in range(2):
            body = {"task": "beta", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
            client.post("/generate", json=body).raise_for_status()

    samples = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(server.metrics())
        for s in family.samples
    }

    warm = samples[
        "prefixd_time_to_first_token_seconds_count", ("prefix", "device"), ("task", "beta")
    ]
    assert warm >= 1
    assert samples["prefixd_generation_tokens_total", ("task", "beta")] >= 8
    assert samples["prefixd_prefix_resident", ("task", "beta")] == 1
    assert ("prefixd_ready",) in samples


def test_a_client_that_leaves_frees_its_blocks(server: LiveServer) -> None:
    with (
        server.client() as client,
        client.stream(
            "POST",
            "/v1/completions",
            json={
                "model": "alpha",
                "prompt": PROMPT,
                "max_tokens": 400,
                "ignore_eos": True,
                "stream": True,
            },
        ) as response,
    ):
        next(response.iter_lines())

    deadline = time.monotonic() + 10
    while "prefixd_requests_running 0.0" not in server.metrics():
        assert time.monotonic() < deadline, "the request went on without its client"
        time.sleep(0.02)


def test_replacing_a_task_does_not_change_a_stream_under_way(
    server: LiveServer, directory: Path, module: nn.Module, prefixes: dict[str, Prefix]
) -> None:
    model = adopt_model(module, model_id="tiny")
    new = random_prefix(model, 16, seed=999)
    body = {
        "model": "replaced",
        "prompt": PROMPT,
        "max_tokens": 200,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with server.client() as client, server.client() as admin:
        old = admin.put(
            "/admin/v1/tasks/replaced", content=artifact(prefixes["gamma"]), headers=ADMIN
        )
        assert old.status_code == 201, old.text
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            lines = response.iter_lines()
            first = next(lines)
            put = admin.put("/admin/v1/tasks/replaced", content=artifact(new), headers=ADMIN)
            assert put.status_code == 200, put.text
            streamed = [first, *lines]
            assert response.headers["x-prefixd-version"] == "1"
        after = client.post("/v1/completions", json=body)
        pinned = client.post("/v1/completions", json={**body, "model": "replaced@v1"})

    tokens = _token_ids_of_stream(streamed)
    assert tokens == expected_tokens(directory, module, prefixes["gamma"], 200)
    assert after.headers["x-prefixd-version"] == "2"
    assert after.json()["choices"][0]["token_ids"] == expected_tokens(directory, module, new, 200)
    assert pinned.json()["choices"][0]["token_ids"] == tokens


def _token_ids_of_stream(lines: list[str]) -> list[int]:
    tokens: list[int] = []
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                tokens += choice.get("token_ids") or []
    return tokens


def test_bad_input_is_refused_by_name_and_changes_nothing(
    server: LiveServer, prefixes: dict[str, Prefix]
) -> None:
    good = artifact(prefixes["alpha"])
    nan = prefixes["alpha"].keys[0].clone()
    nan[0, 0, 0] = float("nan")
    manifest = PrefixManifest(num_virtual_tokens=5, k_space="post_rope", model_type="llama")
    with_nan = encode(manifest, (nan, *prefixes["alpha"].keys[1:]), prefixes["alpha"].values)
    wrong_shape = encode(
        manifest,
        [torch.zeros(5, 6, 8) for _ in range(3)],
        [torch.zeros(5, 6, 8) for _ in range(3)],
    )
    with server.client() as client:
        before = client.get("/admin/v1/tasks", headers=ADMIN).json()

        def put(content: bytes) -> httpx2.Response:
            return client.put("/admin/v1/tasks/alpha", content=content, headers=ADMIN)

        def complete(**body: object) -> httpx2.Response:
            return client.post("/v1/completions", json={"prompt": PROMPT, **body})

        cases = [
            (put(good[:-100]), (400,), "byte"),
            (put(with_nan), (422,), "NaN"),
            (put(wrong_shape), (422,), "heads"),
            (complete(model="nobody"), (404,), "nobody"),
            (complete(), (400,), "model"),
            (complete(model="alpha", prompt="fox " * 900), (400,), "tokens"),
            (complete(model="alpha", temperature=9), (400,), "temperature"),
            (
                client.post(
                    "/v1/completions",
                    content=b'{"model": "alpha", ',
                    headers={"content-type": "application/json"},
                ),
                (400,),
                "JSON",
            ),
            (client.put("/admin/v1/tasks/alpha", content=good), (401,), "key"),
        ]
        for response, statuses, word in cases:
            assert response.status_code in statuses, response.text
            assert word.lower() in response.text.lower(), response.text
        after = client.get("/admin/v1/tasks", headers=ADMIN).json()

    assert after == before


def test_an_upload_is_still_there_after_a_restart(
    directory: Path, module: nn.Module, prefixes: dict[str, Prefix]
) -> None:
    store = str(directory / "restart-store")
    arguments = ("--model", str(directory / "model"), "--store", store)
    with live_server(directory, *arguments) as first, first.client() as client:
        put = client.put(
            "/admin/v1/tasks/alpha", content=artifact(prefixes["alpha"]), headers=ADMIN
        )
        assert put.status_code == 201

    with live_server(directory, *arguments, "--pin", "alpha") as second, second.client() as client:
        answer = client.post(
            "/generate",
            json={
                "task": "alpha",
                "prompt": PROMPT,
                "max_tokens": 24,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        ).json()

    assert answer["digest"] == put.json()["digest"]
    assert answer["token_ids"] == expected_tokens(directory, module, prefixes["alpha"], 24)


def test_a_damaged_prefix_is_a_503_that_says_so_and_harms_no_other_task(
    server: LiveServer, directory: Path, prefixes: dict[str, Prefix]
) -> None:
    with server.client() as client:
        put = client.put(
            "/admin/v1/tasks/damaged",
            content=artifact(prefixes["beta"])[:-4] + b"\0\0\0\0",
            headers=ADMIN,
        )
        assert put.status_code == 201, put.text
        name = put.json()["digest"].removeprefix("sha256:")
        (directory / "store" / "blobs" / name[:2] / name).write_bytes(b"not what was stored")

        damaged = client.post("/v1/completions", json={"model": "damaged", "prompt": PROMPT})
        healthy = client.post("/v1/completions", json={"model": "alpha", "prompt": PROMPT})

    assert damaged.status_code == 503
    assert damaged.json()["error"]["code"] == "prefix_unavailable"
    assert healthy.status_code == 200
