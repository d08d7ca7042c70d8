"""The base behind a prefix computes what transformers computes, row by row, and is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import demo
from server.errors import ModelRefused
from tests.tiny_model_dir import save_tiny_model
from tests.trainer.runs import random_examples, random_prefix, tiny_base
from trainer.base import load_base
from trainer.batches import make_batch
from trainer.errors import BadSetting

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "architecture", ["gpt2", "llama", "qwen3", "gemma", "mistral", "gemma3_text", "opt", "gpt_oss"]
)
def test_each_row_has_the_logits_of_transformers_with_the_prefix_as_past(architecture: str) -> None:
    base = tiny_base(architecture)
    prefix, examples = random_prefix(base, 5), random_examples(4)
    batch = make_batch(examples, CPU)

    with torch.no_grad():
        logits = base.logits(prefix, batch)

    for row, example in enumerate(examples):
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
        tokens = torch.tensor([[*example.prompt_token_ids, *example.completion_token_ids[:-1]]])
        with torch.no_grad():
            alone = base.module(
                input_ids=tokens,
                position_ids=torch.arange(5, 5 + tokens.shape[1])[None],
                past_key_values=cache,
                use_cache=True,
            ).logits[0, len(example.prompt_token_ids) - 1 :]
        torch.testing.assert_close(logits[batch.rows == row], alone, rtol=1e-5, atol=1e-5)


def test_the_output_layer_is_free_again_after_a_pass() -> None:
    base = tiny_base()
    tokens = torch.tensor([[5, 6, 7]])
    before = base.module(input_ids=tokens).logits

    base.logits(None, make_batch(random_examples(2), CPU))

    assert torch.equal(base.module(input_ids=tokens).logits, before)


def test_one_prefix_serves_many_passes_unchanged() -> None:
    base = tiny_base()
    prefix, batch = random_prefix(base, 5), make_batch(random_examples(3), CPU)
    copies = [tensor.clone() for tensor in prefix.tensors]

    first, second = base.logits(prefix, batch), base.logits(prefix, batch)

    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(prefix.tensors, copies, strict=True))


def test_the_bundled_model_is_the_default_and_runs_in_float32_on_a_cpu() -> None:
    base = load_base(None, device="cpu")

    assert base.dtype == torch.float32
    assert base.spec.model_id == demo.BASE_MODEL_ID
    assert load_base(str(demo.MODEL_DIR), device="cpu").spec.model_id == demo.BASE_MODEL_ID


def test_a_folder_is_named_after_itself(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "mine")

    assert load_base(str(tmp_path / "mine"), device="cpu").spec.model_id == "mine"


def test_a_model_that_can_not_be_served_is_not_trained_on(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="is no folder"):
        load_base(str(tmp_path / "missing"), device="cpu")
    save_tiny_model(
        tmp_path / "dynamic",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    with pytest.raises(ModelRefused, match="dynamic"):
        load_base(str(tmp_path / "dynamic"), device="cpu")
