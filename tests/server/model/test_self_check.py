"""The check at load finds what is broken: each of these would have served wrong tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property

import pytest
import torch
from torch import Tensor

from server.errors import ModelRefused
from server.kvcache.kv_cache import LayerKV
from server.model.attention.base import AttentionParams
from server.model.attention.reference import ReferenceAttention
from server.model.forward_batch import ForwardBatch, RowSpan
from server.model.loader import LoadedModel, adopt_model
from server.model.self_check import self_check
from tests.tiny_models import tiny_model

Change = Callable[
    [Tensor, AttentionParams, ForwardBatch], tuple[Tensor, AttentionParams, ForwardBatch]
]


class Broken:
    """The reference, with its inputs changed on the way in."""

    def __init__(self, change: Change) -> None:
        self._change = change

    def attend(
        self, queries: Tensor, layer: LayerKV, params: AttentionParams, batch: ForwardBatch
    ) -> Tensor:
        queries, params, batch = self._change(queries, params, batch)
        return ReferenceAttention().attend(queries, layer, params, batch)


def _without_prefix(batch: ForwardBatch) -> ForwardBatch:
    rows = tuple(
        dataclasses.replace(r, prefix_len=0, prefix_block_ids=(), kv_len=r.kv_len - r.prefix_len)
        for r in batch.rows
    )
    return dataclasses.replace(batch, rows=rows)


class _KeysMovedByOne(RowSpan):
    """Each query sees the key after its own; the last sees the first one again."""

    @cached_property
    def kv_slots(self) -> Tensor:
        return super().kv_slots.roll(-1)


def _last_key_lost(batch: ForwardBatch) -> ForwardBatch:
    rows = tuple(_KeysMovedByOne(**vars(r)) for r in batch.rows)
    return dataclasses.replace(batch, rows=rows)


CHANGES: dict[str, Change] = {
    "scale": lambda q, p, b: (q, dataclasses.replace(p, scale=p.scale * 1.1), b),
    "softcap": lambda q, p, b: (q, dataclasses.replace(p, softcap=1.0), b),
    "window": lambda q, p, b: (q, dataclasses.replace(p, window=3), b),
    "prefix": lambda q, p, b: (q, p, _without_prefix(b)),
    "causality": lambda q, p, b: (q, p, _last_key_lost(b)),
    "nan": lambda q, p, b: (q * math.nan, p, b),
}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return adopt_model(tiny_model("llama"), model_id="tiny")


@pytest.mark.parametrize("name", CHANGES)
def test_a_broken_attention_is_refused(name: str, model: LoadedModel) -> None:
    with pytest.raises(ModelRefused, match="llama: logits through packed attention differ"):
        self_check(model, Broken(CHANGES[name]))


def test_an_attention_that_is_not_broken_passes(model: LoadedModel) -> None:
    assert self_check(model, Broken(lambda q, p, b: (q, p, b))) < 1e-4


def test_a_model_that_does_more_than_attention_says_is_refused() -> None:
    """A model that scales what its own eager path attends with: nothing in its configuration says so."""
    module = tiny_model("llama")
    model = adopt_model(module, model_id="tiny")
    for layer in module.model.layers:  # type: ignore[union-attr]
        layer.self_attn.register_forward_pre_hook(_double_when_eager, with_kwargs=True)

    with pytest.raises(ModelRefused, match="does something in attention"):
        self_check(model, ReferenceAttention())


def _double_when_eager(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> object:
    hidden = kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    if module.config._attn_implementation == "eager":  # type: ignore[union-attr]
        hidden = hidden * 2
    return args, kwargs | {"hidden_states": hidden}
