"""A compiled prompt gives what the model gives when every request begins with that text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prefix_store.artifact import encode
from tests.engine_harness import generate_with_transformers, random_prefix
from tests.real_app import ADMIN, TASKS, RealApp, real_app
from tests.tiny_model_dir import save_tiny_model
from tests.tiny_models import tiny_model

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
QUESTION = [40, 41, 42, 43]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApp]:
    directory = tmp_path_factory.mktemp("compile")
    model = save_tiny_model(directory / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(model))
    with real_app(model, directory / "store") as app:
        yield app


def compiled(app: RealApp, task: str, body: dict[str, Any]) -> dict[str, Any]:
    response = app.client.post(f"{TASKS}/{task}/compile", json=body, headers=ADMIN)
    assert response.status_code == 201, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_compiled_text_is_that_text_in_front_of_every_prompt(app: RealApp) -> None:
    text = "the quick brown fox jumps over the lazy dog."
    ids = list(app.serving.tokenizer.encode(text))

    answer = compiled(app, "text", {"prompt": text})

    assert answer["num_virtual_tokens"] == len(ids)
    expected = generate_with_transformers(tiny_model("llama"), ids + QUESTION, None, 12)
    assert app.tokens("text", QUESTION, 12) == expected


def test_a_compiled_conversation_is_what_the_template_writes(app: RealApp) -> None:
    compiled(app, "chat", {"messages": [{"role": "system", "content": "the lazy dog"}]})

    ids = list(app.serving.tokenizer.encode("<s>system: the lazy dog</s>"))
    expected = generate_with_transformers(tiny_model("llama"), ids + QUESTION, None, 12)
    assert app.tokens("chat", QUESTION, 12) == expected


@pytest.mark.parametrize("token_start", [0, 3, 60])
def test_token_start_is_honoured_and_rebasing_changes_no_token(
    app: RealApp, token_start: int, tmp_path: Path
) -> None:
    module = tiny_model("llama")
    prefix = random_prefix(app.serving.model, 9, seed=token_start)
    manifest = prefix.manifest.model_copy(
        update={"token_start": token_start, "k_space": "post_rope"}
    )
    data = encode(manifest, prefix.keys, prefix.values)

    assert app.put("as-it-is", data).status_code in (200, 201)
    answer = app.put("rebased", data, rebase="true").json()

    prefix = app.serving.store.load(app.serving.store.resolve("as-it-is").digest).prefix
    expected = generate_with_transformers(module, QUESTION, prefix, 12)
    assert app.tokens("as-it-is", QUESTION, 12) == expected
    assert app.tokens("rebased", QUESTION, 12) == expected
    assert f"rotated by {9 - token_start:+d} positions" in answer["recognised"]
    assert app.serving.store.resolve("rebased").manifest.first_position == 9
