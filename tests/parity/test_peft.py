"""Adapters that PEFT made, uploaded as they are: the logits and greedy tokens are those of PEFT."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.peft_adapters import KINDS, NUM_TOKENS, PREFIX_KINDS, TASK_INDEX, Adapter, make_adapter
from tests.real_app import RealApp, real_app
from tests.tiny_model_dir import save_tiny_model
from tests.tiny_models import VOCAB, tiny_model

ARCHITECTURES = ("llama", "gpt2", "opt", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text")
PROMPT = [random.Random(3).randrange(3, VOCAB) for _ in range(11)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def app(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApp]:
    directory = tmp_path_factory.mktemp(architecture)
    save_tiny_model(directory / "model", architecture)
    with real_app(directory / "model", directory / "store") as app:
        yield app


def upload(app: RealApp, adapter: Adapter) -> dict[str, object]:
    query = {"task_index": TASK_INDEX} if adapter.kind == "multitask" else {}
    answer = app.put("task", adapter.file, **query)
    assert answer.status_code in (200, 201), answer.text
    body: dict[str, object] = answer.json()
    return body


@pytest.mark.parametrize("kind", KINDS)
def test_an_uploaded_adapter_gives_the_logits_and_tokens_of_peft(
    app: RealApp, architecture: str, kind: str, tmp_path: Path
) -> None:
    adapter = make_adapter(kind, tiny_model(architecture), tmp_path)

    answer = upload(app, adapter)

    assert answer["num_virtual_tokens"] == NUM_TOKENS
    wanted = "prefix tuning" if kind in PREFIX_KINDS else "soft prompt"
    assert wanted in str(answer["recognised"])
    difference = (app.logits("task", PROMPT) - adapter.logits(PROMPT)).abs().max()
    assert float(difference) <= 1e-5
    assert app.tokens("task", PROMPT, 12) == adapter.generate(PROMPT, 12)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApp]:
    """A model whose sliding window is shorter than the prefix of the adapters."""
    directory = tmp_path_factory.mktemp("windowed")
    save_tiny_model(directory / "model", "mistral", sliding_window=NUM_TOKENS - 3)
    with real_app(directory / "model", directory / "store") as app:
        yield app


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_prefix_longer_than_the_sliding_window_is_seen_as_peft_has_it_seen_and_warned_of(
    windowed: RealApp, kind: str, tmp_path: Path
) -> None:
    adapter = make_adapter(kind, tiny_model("mistral", sliding_window=NUM_TOKENS - 3), tmp_path)

    answer = upload(windowed, adapter)

    assert "sliding window" in str(answer["warnings"])
    difference = (windowed.logits("task", PROMPT) - adapter.logits(PROMPT)).abs().max()
    assert float(difference) <= 1e-5
    assert windowed.tokens("task", PROMPT, 12) == adapter.generate(PROMPT, 12)


def test_adapters_of_all_kinds_in_one_batch_give_what_each_gives_alone(
    windowed: RealApp, tmp_path: Path
) -> None:
    """What PEFT can not do at all."""
    module = tiny_model("mistral", sliding_window=NUM_TOKENS - 3)
    adapters = {}
    for number, kind in enumerate(KINDS):
        task = f"task-{number}"
        adapters[task] = make_adapter(kind, module, tmp_path / task, seed=number)
        query = {"task_index": TASK_INDEX} if kind == "multitask" else {}
        assert windowed.put(task, adapters[task].file, **query).status_code in (200, 201)
    prompts = {task: PROMPT[: 3 + index] for index, task in enumerate(adapters)}

    with ThreadPoolExecutor(len(adapters)) as threads:
        tokens = threads.map(lambda task: windowed.tokens(task, prompts[task], 20), adapters)

    assert dict(zip(adapters, tokens, strict=True)) == {
        task: adapter.generate(prompts[task], 20) for task, adapter in adapters.items()
    }


def test_requests_under_way_do_not_notice_that_a_soft_prompt_is_baked(
    windowed: RealApp, tmp_path: Path
) -> None:
    module = tiny_model("mistral", sliding_window=NUM_TOKENS - 3)
    running = make_adapter("prefix", module, tmp_path / "running")
    windowed.put("running", running.file)
    soft = [make_adapter("prompt", module, tmp_path / str(i), seed=i).file for i in range(4)]

    with ThreadPoolExecutor(2) as threads:
        tokens = threads.submit(windowed.tokens, "running", PROMPT, 60)
        for data in soft:
            assert windowed.put("baked", data).status_code in (200, 201)

    assert tokens.result() == running.generate(PROMPT, 60)
