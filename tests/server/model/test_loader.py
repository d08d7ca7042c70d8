"""What can not be served exactly is refused, by name; what can be is described as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.errors import ModelRefused
from server.model.loader import adopt_model, check_config, load_model
from tests.tiny_models import ARCHITECTURES, VOCAB, tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


def small(model_type: str, **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **settings)


def rope(rope_type: str) -> dict[str, Any]:
    return {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }


REFUSED = {
    "t5": (small("t5", d_model=32, num_layers=1), "encoder-decoder"),
    "bart": (small("bart", d_model=32), "encoder-decoder"),
    "deepseek_v3": (small("deepseek_v3", **SMALL), "multi-head latent attention"),
    "llama4": (small("llama4_text", **SMALL), "layers of type chunked_attention"),
    "qwen3_next": (small("qwen3_next", **SMALL), "layers of type linear_attention"),
    "gemma3n": (small("gemma3n_text", **SMALL), "share the K/V of others"),
    "longrope": (small("phi3", **SMALL, rope_parameters=rope("longrope")), "longrope rotary"),
    "dynamic": (small("llama", **SMALL, rope_parameters=rope("dynamic")), "dynamic rotary"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_that_can_not_be_exact_is_refused_by_name(name: str) -> None:
    config, reason = REFUSED[name]

    with pytest.raises(ModelRefused, match=reason) as caught:
        check_config(config)
    assert str(caught.value).startswith(config.model_type)


UNADOPTABLE = {
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
    "falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "alibi": True}
    | {"num_attention_heads": 4},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4},
}


@pytest.mark.parametrize("name", UNADOPTABLE)
def test_a_model_whose_attention_can_not_be_taken_over_is_refused_by_name(name: str) -> None:
    """Recurrent, or with positions (ALiBi) that live in a mask which packed attention would lose."""
    config = AutoConfig.for_model(name, **UNADOPTABLE[name])
    module = AutoModelForCausalLM.from_config(config)

    with pytest.raises(ModelRefused, match=name):
        adopt_model(module, model_id="tiny")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layout_is_what_the_layers_produce(architecture: str) -> None:
    module = tiny_model(architecture)
    config: Any = module.config
    model = adopt_model(module, model_id="tiny")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or 48 // 6

    assert model.layout.num_layers == 3
    assert {(x.num_kv_heads, x.key_dim, x.value_dim) for x in model.layout.layers} == {
        (heads, dim, dim)
    }
    assert model.layout.dtype == "float32"
    assert model.vocab_size == VOCAB
    assert model.eos_token_ids == {2}
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training


def test_sliding_windows_are_known_per_layer() -> None:
    windows = [x.window for x in adopt_model(tiny_model("gemma2"), model_id="tiny").layout.layers]

    assert set(windows) == {24, None}


def test_positions_are_described_as_the_model_has_them() -> None:
    llama = adopt_model(tiny_model("llama"), model_id="tiny")
    gpt2 = adopt_model(tiny_model("gpt2"), model_id="tiny")

    assert (llama.position_scheme, llama.position_limit) == ("rope", 512)
    assert llama.rope_theta == 10000.0
    assert (gpt2.position_scheme, gpt2.position_limit, gpt2.rope_theta) == ("learned", 512, None)


def test_a_saved_model_loads_with_the_same_weights(tmp_path: Path) -> None:
    module: Any = tiny_model("llama")
    module.save_pretrained(tmp_path / "mine")
    model = load_model(tmp_path / "mine", device=torch.device("cpu"))

    assert model.model_id == "mine"
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.parameters(), model.module.parameters(), strict=True)
    )


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    module: Any = tiny_model("llama")
    module.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(Exception, match=r"safetensors"):
        load_model(tmp_path, device=torch.device("cpu"))


def test_a_directory_without_a_model_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="configuration can not be read"):
        load_model(tmp_path, device=torch.device("cpu"))
