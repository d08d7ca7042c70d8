"""The API over the real model: what comes out of it is what transformers computes from the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.real_app import RealApp, real_app
from tests.tiny_model_dir import save_tiny_model, tiny_tokenizer
from tests.tiny_models import tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}, {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant,{% endif %}"
)
TURNS = [
    {"role": "system", "content": "be quick"},
    {"role": "user", "content": [{"type": "text", "text": "the lazy dog"}]},
]
BASE = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApp]:
    """With prompts cut into small chunks and a warm prompt cache."""
    folder: Path = tmp_path_factory.mktemp("api")
    save_tiny_model(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder / "model"))
    with real_app(
        folder / "model",
        folder / "store",
        served_model_name="tiny",
        max_model_len=128,
        max_num_batched_tokens=16,
        max_num_seqs=8,
    ) as running:
        yield running


def post(app: RealApp, path: str, **body: Any) -> Any:
    response = app.client.post(path, json=BASE | body)
    assert response.status_code == 200, response.text
    return response.json()


def reference(tokens: list[int]) -> Tensor:
    """Log-probabilities [n, V] of what follows each token."""
    with torch.inference_mode():
        logits: Tensor = tiny_model("llama")(input_ids=torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def test_lm_evals_loglikelihoods_are_those_of_the_model(app: RealApp) -> None:
    """Its request, and its reading of the answer: the sum behind the context, and whether each token was the best."""
    prompts = [
        post(app, "/tokenize", prompt=text, add_special_tokens=False)["tokens"]
        for text in (
            "the quick brown fox jumps over the lazy dog. " * 3,
            "many tasks, one model. Prefixes are served; " * 3,
        )
    ]
    assert min(map(len, prompts)) > 16, "longer than a step"
    body = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    first = post(app, "/v1/completions", **body)
    again = post(app, "/v1/completions", **body)

    assert first["choices"] == again["choices"], "what is cached is not told differently"
    for prompt, choice in zip(prompts, first["choices"], strict=True):
        logprobs = choice["logprobs"]
        expected = reference(prompt)
        values = logprobs["token_logprobs"]
        assert len(values) == len(logprobs["top_logprobs"]) == len(prompt) + 1
        assert values[0] is None
        own = [float(expected[i, token]) for i, token in enumerate(prompt[1:])]
        assert values[1:-1] == pytest.approx(own, abs=1e-3)
        greedy = [
            value == max(top.values())
            for value, top in zip(values[1:-1], logprobs["top_logprobs"][1:-1], strict=True)
        ]
        assert greedy == [
            token == int(row.argmax()) for token, row in zip(prompt[1:], expected[:-1], strict=True)
        ]


def test_a_prompt_alone_is_told_without_an_answer(app: RealApp) -> None:
    body = {"prompt": "the quick brown fox", "logprobs": 0, "echo": True}
    alone = post(app, "/v1/completions", **body, max_tokens=0)
    longer = post(app, "/v1/completions", **body, max_tokens=1)

    assert alone["choices"][0]["text"] == "the quick brown fox"
    told = alone["choices"][0]["logprobs"]["token_logprobs"]
    assert told == longer["choices"][0]["logprobs"]["token_logprobs"][:-1]
    assert alone["usage"]["completion_tokens"] == 0
    assert "".join(alone["choices"][0]["logprobs"]["tokens"]) == "the quick brown fox"


def test_a_chat_is_a_completion_of_what_the_template_makes(app: RealApp) -> None:
    tokens = post(app, "/tokenize", messages=TURNS)["tokens"]
    text = post(app, "/detokenize", tokens=tokens)["prompt"]
    assert text == "system, be quick\nuser, the lazy dog\nassistant,"

    settings = {"max_tokens": 9, "ignore_eos": True, "return_token_ids": True}
    chat = post(app, "/v1/chat/completions", messages=TURNS, **settings)
    plain = post(app, "/v1/completions", prompt=tokens, **settings)

    (turn,), (choice,) = chat["choices"], plain["choices"]
    assert turn["token_ids"] == choice["token_ids"]
    assert turn["message"]["content"] == choice["text"]
    assert chat["usage"]["prompt_tokens"] == len(tokens)


def test_a_chats_stream_joins_to_its_answer_and_its_probabilities(app: RealApp) -> None:
    settings = {"messages": TURNS, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = post(app, "/v1/chat/completions", **settings)["choices"][0]
    response = app.client.post("/v1/chat/completions", json=BASE | settings | {"stream": True})

    chunks = [json.loads(e.removeprefix("data: ")) for e in response.text.split("\n\n")[:-2]]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(c["delta"]["content"] for c in choices) == whole["message"]["content"]
    told = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    assert told == whole["logprobs"]["content"]
    for entry in told:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"], "it is greedy"


def test_a_bias_forces_and_forbids_a_token(app: RealApp) -> None:
    plain = app.tokens("tiny", [5, 6, 7], 1)[0]
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "return_token_ids": True, "ignore_eos": True}

    forced = post(app, "/v1/completions", **body, logit_bias={"9": 100})
    banned = post(app, "/v1/completions", **body, logit_bias={str(plain): -100})

    assert forced["choices"][0]["token_ids"] == [9]
    assert banned["choices"][0]["token_ids"] != [plain]
    for wrong in ({"199": 1}, {"x": 1}):
        refused = app.client.post("/v1/completions", json=BASE | body | {"logit_bias": wrong})
        assert refused.json()["error"]["param"] == "logit_bias"


def test_tgis_details_are_those_of_the_completion(app: RealApp) -> None:
    parameters = {
        "adapter_id": "tiny",
        "max_new_tokens": 5,
        "details": True,
        "decoder_input_details": True,
        "ignore_eos_token": True,
    }
    answer = app.client.post(
        "/", json={"inputs": "the quick brown fox", "parameters": parameters}
    ).json()[0]
    completion = post(
        app,
        "/v1/completions",
        prompt="the quick brown fox",
        max_tokens=5,
        logprobs=0,
        echo=True,
        ignore_eos=True,
        return_token_ids=True,
    )["choices"][0]

    details = answer["details"]
    assert "the quick brown fox" + answer["generated_text"] == completion["text"]
    assert [t["id"] for t in details["tokens"]] == completion["token_ids"]
    told = [t["logprob"] for t in (*details["prefill"], *details["tokens"])]
    assert told[0] is None
    assert told[1:] == pytest.approx(completion["logprobs"]["token_logprobs"][1:], abs=1e-5)


def test_an_answer_without_a_length_ends_where_the_context_does(app: RealApp) -> None:
    settings = {"messages": TURNS, "ignore_eos": True}
    usage = post(app, "/v1/chat/completions", **settings)["usage"]
    info = post(app, "/tokenize", prompt="x")

    assert usage["total_tokens"] == info["max_model_len"]
