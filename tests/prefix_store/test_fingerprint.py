"""Which weights a prefix was trained on."""

from __future__ import annotations

import copy
import re
import time
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

import demo
from prefix_store.fingerprint import (
    base_fingerprint,
    base_model_ref,
    config_fingerprint,
    tokenizer_fingerprint,
)
from tests.tiny_models import VOCAB, tiny_model


def model(seed: int = 0, width: int = 50) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(width, 3), torch.nn.LayerNorm(3))


def test_the_same_weights_agree_in_float32_and_bfloat16() -> None:
    expected = base_fingerprint(model())
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", expected)
    assert base_fingerprint(model()) == expected
    assert base_fingerprint(model().to(torch.bfloat16)) == expected


def test_weights_saved_as_bfloat16_agree_when_loaded_as_float32() -> None:
    saved = model().to(torch.bfloat16)
    expected = base_fingerprint(saved)
    assert base_fingerprint(saved.to(torch.float32)) == expected


def test_other_weights_other_names_and_other_shapes_differ() -> None:
    found = {
        base_fingerprint(model()),
        base_fingerprint(model(seed=1)),
        base_fingerprint(model(width=51)),
    }
    found.add(base_fingerprint(torch.nn.ModuleDict({"a": model()})))
    assert len(found) == 4


def test_first_and_last_value_of_a_large_tensor_are_in_the_sample() -> None:
    for index in (0, -1):
        changed = model()
        with torch.no_grad():
            weight = next(changed.parameters()).view(-1)
            weight[index] += 1
        assert base_fingerprint(changed) != base_fingerprint(model())


def test_the_cost_does_not_grow_with_the_weights() -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(torch.zeros(1).expand(10**9) for _ in range(290))

    started = time.monotonic()
    base_fingerprint(Wide())
    assert time.monotonic() - started < 2  # well under a second on an idle machine


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=48, num_attention_heads=6, **changes)


def test_settings_that_change_what_the_weights_compute_change_the_fingerprint() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    changed = [
        llama_config(),
        llama_config(rms_norm_eps=1e-5),
        llama_config(hidden_act="gelu"),
        llama_config(num_key_value_heads=3),
        llama_config(rope_parameters=rope),
        llama_config(tie_word_embeddings=True),
    ]
    assert len({config_fingerprint(config) for config in changed}) == len(changed)


def test_settings_that_compute_nothing_leave_the_fingerprint() -> None:
    others = llama_config(use_cache=False, bos_token_id=7, name_or_path="somewhere/else")
    others.transformers_version = "99.0"
    others.a_field_of_a_later_release = True
    assert config_fingerprint(others) == config_fingerprint(llama_config())


def test_how_a_number_is_written_makes_no_other_model() -> None:
    def config(theta: float) -> LlamaConfig:
        return llama_config(rope_parameters={"rope_type": "default", "rope_theta": theta})

    assert config_fingerprint(config(10000)) == config_fingerprint(config(10000.0))


def test_how_many_experts_answer_is_part_of_the_fingerprint() -> None:
    one = tiny_model("gpt_oss", num_experts_per_tok=1).config
    two = tiny_model("gpt_oss", num_experts_per_tok=2).config
    assert config_fingerprint(one) != config_fingerprint(two)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(demo.MODEL_DIR))


def test_the_same_tokenizer_loaded_again_has_the_same_fingerprint(tokenizer: Any) -> None:
    again = AutoTokenizer.from_pretrained(str(demo.MODEL_DIR))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_a_tokenizer_with_more_tokens_or_other_special_ones_has_another_fingerprint(
    tokenizer: Any,
) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>"])
    assert tokenizer_fingerprint(larger) != tokenizer_fingerprint(tokenizer)

    class WithBeginning:
        """The same tokens, and one more before every text."""

        def __len__(self) -> int:
            return len(tokenizer)

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *tokenizer(text)["input_ids"]]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            tokens: list[str] = tokenizer.convert_ids_to_tokens(ids)
            return tokens

    assert tokenizer_fingerprint(WithBeginning()) != tokenizer_fingerprint(tokenizer)


def test_a_reference_names_weights_settings_and_tokenizer(tokenizer: Any) -> None:
    module = tiny_model("llama")
    ref = base_model_ref(module, tokenizer, model_id="org/name")
    assert ref.fingerprint == base_fingerprint(module)
    assert ref.config_fingerprint == config_fingerprint(module.config)
    assert ref.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert (ref.id, ref.vocab_size) == ("org/name", VOCAB)
    assert base_model_ref(module).tokenizer_fingerprint is None
