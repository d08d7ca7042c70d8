"""The rotation of a model's keys is found and proved, or said to be unknown."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from server.model.base_spec import base_spec
from server.model.loader import adopt_model
from server.model.rotary import find_rotary
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("architecture", "num_pairs"), [("llama", 4), ("qwen3", 8), ("gpt_oss", 8), ("gpt_neox", 1)]
)
def test_the_rotary_part_of_every_layer_is_found(architecture: str, num_pairs: int) -> None:
    rotary = find_rotary(adopt_model(tiny_model(architecture), model_id="tiny"))
    assert rotary is not None
    assert {len(layer.inverse_frequencies) for layer in rotary} == {num_pairs}
    assert not any(layer.interleaved for layer in rotary)


def test_layers_with_frequencies_of_their_own_are_told_apart() -> None:
    rotary = find_rotary(
        adopt_model(
            tiny_model("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4),
            model_id="tiny",
        )
    )  # fmt: skip
    assert rotary is not None
    assert rotary[0] == rotary[2] != rotary[1] == rotary[3]


def test_bfloat16_is_no_obstacle() -> None:
    model = adopt_model(tiny_model("llama").to(torch.bfloat16), model_id="tiny")
    assert find_rotary(model) is not None


def test_frequencies_that_do_not_fit_the_keys_are_not_taken() -> None:
    module = tiny_model("llama")
    model = adopt_model(module, model_id="tiny")

    class Odd(nn.Module):
        """Positions that are a rotation with other frequencies than the buffer says."""

        def forward(
            self, x: torch.Tensor, position_ids: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            angles = position_ids[..., None].float() * torch.linspace(0.3, 0.9, 8)
            return angles.cos(), angles.sin()

    odd = Odd()
    odd.register_buffer("inv_freq", torch.ones(4))
    module.model.rotary_emb = odd  # type: ignore[union-attr]

    assert find_rotary(model) is None


def test_models_without_rotary_positions_have_none() -> None:
    spec = base_spec(adopt_model(tiny_model("gpt2"), model_id="tiny"))
    assert spec.rotary is None
    assert (spec.hidden_size, spec.num_attention_heads) == (48, 6)
