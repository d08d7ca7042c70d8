"""Merged layers against the layers by themselves: which are merged, and that no bit of a served model changes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.errors import ModelRefused
from server.model.attention import make_attention_backend
from server.model.loader import LoadedModel, adopt_model
from server.model.merged_linear import MergedLinear, MergedPart, merge_linears
from server.model.prepacked_linear import prepack
from server.model.self_check import self_check
from tests.engine_harness import Harness, random_prefix
from tests.tiny_models import ARCHITECTURES, tiny_model

DTYPES = [torch.float32, torch.bfloat16]
QKV, GATE_UP = "q_proj k_proj v_proj", "gate_proj up_proj"
MERGED = {
    "gemma": {QKV, GATE_UP},
    "gemma2": {QKV, GATE_UP},
    "gemma3_text": {QKV, GATE_UP},
    "gpt2": set(),  # stored merged
    "gpt_neox": set(),  # stored merged
    "gpt_oss": {QKV},  # its experts are no linear layers
    "llama": {QKV, GATE_UP},
    "mistral": {QKV, GATE_UP},
    "olmo2": {QKV, GATE_UP},
    "opt": {QKV},
    "phi3": set(),  # stored merged
    "qwen2": {QKV, GATE_UP},
    "qwen3": {QKV, GATE_UP},
}


def load(architecture: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> LoadedModel:
    return adopt_model(tiny_model(architecture, **overrides).to(dtype), model_id="tiny")


def merged_names(model: LoadedModel) -> set[str]:
    """The names of the layers that were merged with each other, for each group once."""
    found: dict[MergedLinear, dict[int, str]] = {}
    for parent in model.module.modules():
        for name, child in parent.named_children():
            if isinstance(child, MergedPart):
                found.setdefault(child.merged, {})[child.index] = name
    return {" ".join(names[i] for i in sorted(names)) for names in found.values()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_reads_the_same_tensor_is_merged_in_every_layer(architecture: str) -> None:
    model = merge_linears(load(architecture))

    assert merged_names(model) == MERGED[architecture]
    groups = [m for m in model.module.modules() if isinstance(m, MergedLinear)]
    assert len(groups) == len(MERGED[architecture]) * model.layout.num_layers
    assert self_check(model, make_attention_backend("auto")) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [a for a, names in MERGED.items() if names])
def test_prepacked_a_merged_model_gives_the_same_bits_as_one_that_is_not(
    architecture: str, dtype: torch.dtype
) -> None:
    logits = []
    for merged in (False, True):
        harness = Harness(tiny_model(architecture).to(dtype), merged=merged, prepacked=True)
        seen = record(harness)
        for i, length in enumerate((3, 21, 40)):
            prefix = random_prefix(harness.model, 5, seed=5) if i else None
            harness.add(str(i), [(7 * i + 3 * t) % 190 + 3 for t in range(length)], prefix)
        harness.run()
        logits.append(seen)

    plain, merged_ones = logits
    assert len(plain) == len(merged_ones) > 8
    assert all(torch.equal(a, b) for a, b in zip(plain, merged_ones, strict=True))


def record(harness: Harness) -> list[Tensor]:
    """The logits of each step that the harness will take."""
    seen: list[Tensor] = []
    forward = harness.runner.forward

    def recorded(rows: tuple[object, ...]) -> Tensor:
        logits = forward(rows)  # type: ignore[arg-type] # handed through
        seen.append(logits.clone())
        return logits

    harness.runner.forward = recorded  # type: ignore[method-assign] # listens in
    return seen


def test_activations_are_padded_for_the_widths_of_the_layers_and_not_of_their_product() -> None:
    shape = prepack(load("llama")).pack_shape

    assert prepack(merge_linears(load("llama"))).pack_shape == shape


def test_layers_of_which_only_one_has_a_bias_are_merged_exactly() -> None:
    layers = [nn.Linear(16, 8, bias=False), nn.Linear(16, 24), nn.Linear(16, 64, bias=False)]
    x = torch.randn(1, 5, 16)
    merged = MergedLinear(layers)
    parts = [MergedPart(merged, i) for i in range(3)]

    for layer, part in zip(layers, parts, strict=True):
        torch.testing.assert_close(part(x), layer(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 1, 0), (2, 0, 2)], ids=str)
def test_parts_asked_in_another_order_with_other_tensors_give_what_their_layers_give(
    order: tuple[int, ...],
) -> None:
    layers = [nn.Linear(16, 8), nn.Linear(16, 24), nn.Linear(16, 64)]
    merged = MergedLinear(layers)
    parts = [MergedPart(merged, i) for i in range(3)]

    for same_input in (True, False):
        x = torch.randn(1, 5, 16)
        for i in order:
            x = x if same_input else torch.randn(1, 5, 16)
            torch.testing.assert_close(parts[i](x), layers[i](x), rtol=0, atol=1e-6)


def test_one_product_is_computed_for_all_parts_and_nothing_is_kept() -> None:
    merged = MergedLinear([nn.Linear(16, 64), nn.Linear(16, 64)])
    products = []
    merged.linear.register_forward_hook(lambda *_: products.append(1))
    x = torch.randn(1, 5, 16)

    for i in (0, 1):
        MergedPart(merged, i)(x)
    kept = weakref.ref(x)
    del x

    assert len(products) == 1
    assert kept() is None


def test_the_weights_of_the_layers_are_let_go() -> None:
    model = load("llama")
    attention = model.module.model.layers[0].self_attn  # type: ignore[union-attr, index]
    plain = weakref.ref(attention.k_proj.weight)
    num_bytes = sum(p.numel() for p in model.module.parameters())

    merge_linears(model)

    assert plain() is None
    assert sum(p.numel() for p in model.module.parameters()) == num_bytes


def test_layers_that_clip_what_they_get_in_place_clip_their_own_part_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "olmo", ARCHITECTURES["llama"] | {"clip_qkv": 0.5})
    ids = torch.randint(3, 190, (1, 9))
    expected = tiny_model("olmo")(ids).logits

    model = merge_linears(load("olmo"))

    assert merged_names(model) == {QKV, GATE_UP}
    model.module.set_attn_implementation("eager")  # type: ignore[operator]
    torch.testing.assert_close(model.module(ids).logits, expected)


class Odd(nn.Module):
    """Layers of one input, some of which must not be merged; where `changes` says so, none."""

    def __init__(self, *, changes: bool) -> None:
        super().__init__()
        self.changes = changes
        self.first, self.twice, self.tied, self.other, self.second = (
            nn.Linear(48, 48) for _ in range(5)
        )
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + self.twice(x) + self.twice(x) + self.tied(x)
        out = out + self.second(x.mul_(2) if self.changes else x)
        return out + torch.relu(self.other(out))


@pytest.mark.parametrize(("changes", "expected"), [(False, {"first second"}), (True, set())])
def test_layers_called_twice_or_tied_or_between_which_the_tensor_changed_are_not_merged(
    changes: bool, expected: set[str]
) -> None:
    model = load("gpt2")
    stack: nn.ModuleList = model.module.transformer.h  # type: ignore[union-attr, assignment]
    stack[1].mlp = Odd(changes=changes).requires_grad_(False)

    assert merged_names(merge_linears(model)) == expected


def test_a_model_whose_numbers_would_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MergedLinear, "part", lambda self, index, x: self._product(x)[0] * 1.01)
    model = load("llama", num_key_value_heads=6)

    with pytest.raises(ModelRefused, match="merged linear layers"):
        merge_linears(model)
