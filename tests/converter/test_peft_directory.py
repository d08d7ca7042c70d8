"""Directories that PEFT wrote give what PEFT gives: every kind, old `.bin` files, named adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefix_store.artifact import Prefix
from server.model.loader import adopt_model
from tests.peft_adapters import KINDS, TASK_INDEX, make_adapter
from tests.real_app import packed_logits
from tests.tiny_models import tiny_model

PROMPT = [5, 9, 21, 8, 60, 61, 7]
Convert = Callable[..., Prefix]
Refusal = Callable[..., str]


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_adapter_gives_the_logits_of_peft(
    kind: str, base: Path, convert: Convert, tmp_path: Path
) -> None:
    module = tiny_model("llama")
    adapter = make_adapter(kind, module, tmp_path / "adapter")
    flags = ["--task-index", TASK_INDEX] if kind == "multitask" else []

    prefix = convert(adapter.directory, "--base", base, *flags)

    ours = packed_logits(adopt_model(module, model_id="tiny"), prefix, PROMPT)
    assert float((ours - adapter.logits(PROMPT)).abs().max()) <= 1e-5
    assert prefix.manifest.base_model.fingerprint is not None
    assert prefix.manifest.source["format"] == "peft"
    assert prefix.manifest.source["peft_type"] == str(
        adapter.model.peft_config["default"].peft_type.value
    )


def test_a_bin_file_one_directory_down_gives_the_same_tensors(
    base: Path, convert: Convert, tmp_path: Path
) -> None:
    made = make_adapter("prefix", tiny_model("llama"), tmp_path / "adapter").directory
    named = tmp_path / "outer" / "my-task"
    named.mkdir(parents=True)
    torch.save(load_file(made / "adapter_model.safetensors"), named / "adapter_model.bin")
    shutil.copy(made / "adapter_config.json", named)

    first, second = convert(made, "--base", base), convert(tmp_path / "outer", "--base", base)

    assert all(torch.equal(a, b) for a, b in zip(first.keys, second.keys, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.values, second.values, strict=True))


def test_a_dtype_can_be_chosen(base: Path, convert: Convert, tmp_path: Path) -> None:
    made = make_adapter("prefix", tiny_model("llama"), tmp_path / "adapter").directory
    assert convert(made, "--base", base, "--dtype", "bfloat16").keys[0].dtype == torch.bfloat16


def test_geometry_alone_is_enough_for_a_prefix_and_not_for_a_soft_prompt(
    base: Path, convert: Convert, refusal: Refusal, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    prefix = make_adapter("prefix", tiny_model("llama"), tmp_path / "prefix").directory
    prompt = make_adapter("prompt", tiny_model("llama"), tmp_path / "prompt").directory

    assert convert(prefix, "--base", bare).manifest.base_model.fingerprint is None
    assert "give a --base that holds the weights" in refusal(prompt, "--base", bare)


def test_what_can_not_be_a_prefix_is_refused_by_name(
    base: Path, refusal: Refusal, tmp_path: Path
) -> None:
    made = make_adapter("prefix", tiny_model("llama"), tmp_path / "adapter").directory
    config = made / "adapter_config.json"
    settings = json.loads(config.read_text())

    assert "give the base model's directory with --base" in refusal(made)
    config.write_text(json.dumps(settings | {"peft_type": "LORA"}))
    assert "peft_type 'LORA': expected one of PREFIX_TUNING" in refusal(made, "--base", base)
    config.write_text(json.dumps(settings | {"num_attention_heads": 4}))
    assert "num_attention_heads is 4, the base has 2" in refusal(made, "--base", base)
    config.write_text("{")
    assert "adapter_config.json is not JSON" in refusal(made, "--base", base)


def test_an_adapter_for_another_number_of_layers_is_refused(
    base: Path, refusal: Refusal, tmp_path: Path
) -> None:
    other = tiny_model("llama", num_hidden_layers=4)
    made = make_adapter("prefix", other, tmp_path / "adapter").directory
    assert "These fit 4 layers, the base model has 3" in refusal(made, "--base", base)


def test_a_base_with_latent_attention_is_refused_by_name(
    base: Path, refusal: Refusal, tmp_path: Path
) -> None:
    made = make_adapter("prefix", tiny_model("llama"), tmp_path / "adapter").directory
    other = tmp_path / "mla"
    other.mkdir()
    (other / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v3", "kv_lora_rank": 16})
    )
    assert "multi-head latent attention" in refusal(made, "--base", other)
