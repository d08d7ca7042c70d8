"""The gradient that training follows is the slope of the loss, for every way to parameterise a prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.runs import ARCHITECTURES, random_examples, tiny_base
from trainer.base import FrozenBase
from trainer.config import TrainConfig
from trainer.encoding import EncodedExample
from trainer.gradients import add_gradients
from trainer.held_out_loss import mean_loss
from trainer.initial import from_vocabulary
from trainer.loss import next_token_loss
from trainer.prefix_encoder import PrefixEncoder, build_encoder

ENCODERS: tuple[dict[str, Any], ...] = (
    {"encoder": "direct"},
    {"encoder": "direct", "num_frozen_tokens": 2},
    {"encoder": "mlp", "mlp_embedding_size": 5, "mlp_hidden_size": 7},
    {"encoder": "mlp", "num_frozen_tokens": 1, "mlp_embedding_size": 5, "mlp_hidden_size": 7},
    {"encoder": "soft", "num_frozen_tokens": 1},
)


def compute_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms of these models compute in float32 whatever comes in, which would drown small differences."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def encoder_of(base: FrozenBase, **settings: Any) -> PrefixEncoder:
    """In float64, every parameter moved away from where it begins, where some gradients are zero."""
    config = TrainConfig(data="data.jsonl", output="run", num_virtual_tokens=5, **settings)
    encoder = build_encoder(base, config, from_vocabulary(base, 5, seed=3)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return encoder


def gradient(
    base: FrozenBase, encoder: PrefixEncoder, examples: list[EncodedExample], rows: int = 100
) -> list[Tensor]:
    encoder.zero_grad(set_to_none=True)
    add_gradients(base, encoder, examples, rows=rows, reduction="mean", objective=next_token_loss)
    return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("settings", ENCODERS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_the_slope_of_the_loss_in_float64(
    architecture: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(architecture, double=True)
    compute_in_float64(monkeypatch)
    encoder, examples = encoder_of(base, **settings), random_examples(5)
    gradients = gradient(base, encoder, examples)
    parameters = list(encoder.parameters())
    assert len(gradients) == len(parameters), "every parameter is trained"
    generator = torch.Generator().manual_seed(2)

    def loss_at(moves: list[Tensor], size: float) -> float:
        with torch.no_grad():
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.add_(size * move)
            loss = mean_loss(base, encoder(), examples, 100, next_token_loss)
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.sub_(size * move)
        return loss

    for _ in range(3):
        moves = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        epsilon = 1e-5
        slope = (loss_at(moves, epsilon) - loss_at(moves, -epsilon)) / (2 * epsilon)
        expected = sum(float((g * m).sum()) for g, m in zip(gradients, moves, strict=True))
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-8)
        assert abs(slope) > 1e-6, "a slope of zero would prove nothing"


def test_a_step_cut_into_passes_has_the_gradient_of_the_whole() -> None:
    base = tiny_base(double=True)
    encoder, examples = encoder_of(base, encoder="mlp"), random_examples(7)

    whole = gradient(base, encoder, examples)

    for rows in (1, 2, 3):
        for part, expected in zip(gradient(base, encoder, examples, rows), whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-12)


def test_the_summed_loss_weighs_examples_and_the_mean_weighs_tokens() -> None:
    base = tiny_base(double=True)
    encoder, examples = encoder_of(base, encoder="direct"), random_examples(4)
    num_targets = sum(len(e.completion_token_ids) for e in examples)
    mean = gradient(base, encoder, examples)

    encoder.zero_grad(set_to_none=True)
    done = add_gradients(
        base, encoder, examples, rows=4, reduction="sum", objective=next_token_loss
    )

    for parameter, expected in zip(encoder.parameters(), mean, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad / num_targets * 4, expected)
    assert done.mean == pytest.approx(
        mean_loss(base, encoder(), examples, 4, next_token_loss), rel=1e-9
    )


@pytest.mark.parametrize(
    ("architecture", "encoder_name", "attention"),
    [
        *((architecture, "direct", "sdpa") for architecture in ARCHITECTURES),
        ("llama", "soft", "sdpa"),
        ("llama", "soft", "eager"),
    ],
)
def test_recomputed_activations_give_the_same_gradient(
    architecture: str, encoder_name: str, attention: str
) -> None:
    base = tiny_base(architecture, double=True)
    base.module.set_attn_implementation(attention)
    encoder, examples = encoder_of(base, encoder=encoder_name), random_examples(5)
    kept = gradient(base, encoder, examples)
    passes = []
    first = next(m for m in base.module.modules() if hasattr(m, "layer_idx"))
    first.register_forward_hook(lambda *_: passes.append(1))

    base.recompute_activations()
    recomputed = gradient(base, encoder, examples)

    once = 2 if encoder_name == "soft" else 1  # that one has a pass of its own
    assert len(passes) == 2 * once, "the layer ran again in the backward pass"
    for one, other in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_base_model_gets_no_gradient_and_stays_as_it_was() -> None:
    base = tiny_base()
    before = [parameter.clone() for parameter in base.module.parameters()]
    encoder = build_encoder(
        base,
        TrainConfig(data="d.jsonl", output="run", encoder="soft"),
        from_vocabulary(base, 5, seed=0),
    )

    add_gradients(
        base, encoder, random_examples(3), rows=3, reduction="mean", objective=next_token_loss
    )

    assert not base.module.training
    for parameter, old in zip(base.module.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)
