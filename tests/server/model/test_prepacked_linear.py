"""Prepacked layers against plain ones, and their independence of the number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from prefix_store.fingerprint import base_fingerprint
from server.model.attention import make_attention_backend
from server.model.loader import LoadedModel, adopt_model
from server.model.prepacked_linear import PrepackedLinear, can_prepack, prepack
from server.model.self_check import self_check
from tests.tiny_models import ARCHITECTURES, tiny_model

# [out, in]; the last two are deep enough for a kernel of its own for one row.
SHAPES = [(24, 48), (80, 48), (512, 192), (1152, 896), (768, 3072), (896, 4864)]
DTYPES = [torch.float32, torch.bfloat16]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def load(architecture: str) -> LoadedModel:
    return adopt_model(tiny_model(architecture), model_id="tiny")


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@dtypes
@shapes
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_prepacked_layer_gives_what_the_plain_one_does(
    shape: tuple[int, int], dtype: torch.dtype, with_bias: bool
) -> None:
    weight, x = draw(*shape, dtype=dtype), draw(3, 5, shape[1], dtype=dtype)
    bias = draw(shape[0], dtype=dtype) if with_bias else None

    ours = PrepackedLinear(weight, bias)(x)

    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    expected = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert ours.shape == expected.shape
    assert ours.dtype is dtype
    assert float((ours.double() - expected).abs().max() / expected.abs().max()) < tolerance


@dtypes
@shapes
def test_a_row_of_several_has_the_same_bits_however_many_they_are(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer, x = PrepackedLinear(draw(*shape, dtype=dtype), None), draw(300, shape[1], dtype=dtype)
    with torch.inference_mode():
        expected = layer(x)
        for num_rows in (2, 3, 4, 5, 7, 8, 11, 12, 15, 16, 17, 31, 33, 64, 65, 128, 129, 200):
            for first in (0, 1, 99):
                ours = layer(x[first : first + num_rows].clone())
                assert torch.equal(ours, expected[first : first + num_rows]), (
                    f"{num_rows} rows from {first}"
                )


def test_no_rows_give_no_rows() -> None:
    layer = PrepackedLinear(draw(24, 48, dtype=torch.float32), None)

    assert layer(torch.empty(1, 0, 48)).shape == (1, 0, 24)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prepacked_model_passes_the_check_at_load(architecture: str) -> None:
    model = load(architecture)
    weight_bytes = model.weight_bytes

    packed = prepack(model)

    assert self_check(packed, make_attention_backend("auto")) < 1e-4
    left = [m for m in packed.module.modules() if type(m) in (nn.Linear, Conv1D)]
    assert left == []
    assert packed.weight_bytes == weight_bytes, "what was loaded is reported as it was"


def test_prepacking_twice_is_prepacking_once() -> None:
    once = prepack(load("llama"))
    layers = [m for m in once.module.modules() if isinstance(m, PrepackedLinear)]

    twice = prepack(once)

    assert twice == once
    assert [m for m in twice.module.modules() if isinstance(m, PrepackedLinear)] == layers


def test_plain_weights_are_let_go_but_for_an_embedding_that_is_tied() -> None:
    model = prepack(load("gpt2"))

    kept = {name for name, parameter in model.module.named_parameters() if parameter.ndim == 2}
    assert kept == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_a_model_in_another_dtype_stays_as_it_is() -> None:
    model = adopt_model(tiny_model("llama").half(), model_id="tiny")
    fingerprint = base_fingerprint(model.module)

    assert not can_prepack(model)
    assert prepack(model) is model
    assert base_fingerprint(model.module) == fingerprint
