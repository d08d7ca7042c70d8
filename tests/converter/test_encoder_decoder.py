"""PEFT prefixes of encoder-decoders: the rows that PEFT really reads, for even and odd layer counts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import BartConfig, BartForConditionalGeneration

from converter.__main__ import main

P = 5


def tiny_bart(layers: int) -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=60,
        d_model=24,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
    )
    return BartForConditionalGeneration(config).eval()


def adapter_of(kind: Any, model: Any, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, kind(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P))
        adapted.save_pretrained(str(directory))
        return peft.PeftModel.from_pretrained(
            tiny_bart(model.config.encoder_layers), str(directory)
        )


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_the_decoder_has_the_cache_that_peft_builds(layers: int, tmp_path: Path) -> None:
    model = tiny_bart(layers)
    model.config.save_pretrained(str(tmp_path / "base"))
    adapted = adapter_of(peft.PrefixTuningConfig, model, tmp_path / "adapter")
    cache = adapted.get_prompt(batch_size=1).self_attention_cache
    target = tmp_path / "out.safetensors"

    assert main([str(tmp_path / "adapter"), str(target), "--base", str(tmp_path / "base")]) == 0

    tensors = load_file(target)
    assert len(tensors) == 2 * layers
    for index, layer in enumerate(cache.layers):
        assert torch.equal(tensors[f"dec_self.{index:03d}.k"], layer.keys[0].transpose(0, 1))
        assert torch.equal(tensors[f"dec_self.{index:03d}.v"], layer.values[0].transpose(0, 1))


def test_the_sharing_of_rows_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_bart(2)
    model.config.save_pretrained(str(tmp_path / "base"))
    adapter_of(peft.PrefixTuningConfig, model, tmp_path / "adapter")

    main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(tmp_path / "base")])

    printed = capsys.readouterr().out
    assert "decoder rows [0, 0]" in printed
    assert "half of it is not read" in printed
    assert "decoder self-attention only" in printed


def test_a_soft_prompt_of_an_encoder_decoder_is_refused_by_name(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    model = tiny_bart(2)
    model.config.save_pretrained(str(tmp_path / "base"))
    adapter_of(peft.PromptTuningConfig, model, tmp_path / "adapter")
    message = refusal(tmp_path / "adapter", "--base", tmp_path / "base")
    assert "PROMPT_TUNING of an encoder-decoder" in message
    assert "depends on the input" in message.replace("depends\non", "depends on")


def test_a_base_with_more_decoder_layers_is_refused(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    model = tiny_bart(2)
    adapter_of(peft.PrefixTuningConfig, model, tmp_path / "adapter")
    config = tiny_bart(2).config
    config.decoder_layers = 4
    config.save_pretrained(str(tmp_path / "base"))
    assert json.loads((tmp_path / "base" / "config.json").read_text())["decoder_layers"] == 4
    message = refusal(tmp_path / "adapter", "--base", tmp_path / "base")
    assert "4 decoder layers, the adapter 2" in message
