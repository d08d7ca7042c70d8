"""What a prompt may be before the model is asked to bake it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_store.artifact import decode
from prefix_store.importers.recognition import Provenance, Recognition
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.spec import BaseSpec
from prefix_store.validation import Limits
from server.engine.prefix_compiler import PrefixCompiler
from server.errors import ContextTooLong, InvalidParameter
from tests.prefix_store.builders import TINY_BASE, random_kv

PROVENANCE = Provenance("prompt", Recognition("a prompt"))


class FakeBake:
    """Two steps, then tensors of the right shape."""

    def __init__(self, prompt: SoftPrompt | tuple[int, ...]) -> None:
        self._length = prompt.num_virtual_tokens if isinstance(prompt, SoftPrompt) else len(prompt)
        self._steps = 0

    def step(self) -> bool:
        self._steps += 1
        return self._steps == 2

    def result(self) -> tuple[list[Tensor], list[Tensor]]:
        assert self._steps == 2
        return random_kv(TINY_BASE, self._length)


class FakeBaker:
    def start(self, prompt: SoftPrompt | tuple[int, ...]) -> FakeBake:
        return FakeBake(prompt)


def compiler(base: BaseSpec = TINY_BASE) -> tuple[PrefixCompiler, list[Any]]:
    calls: list[Any] = []

    async def run(function: Callable[[], Any]) -> Any:
        calls.append(function)
        return function()

    return PrefixCompiler(run, FakeBaker(), base, Limits(max_num_virtual_tokens=16)), calls


def test_a_prompt_is_baked_step_by_step_and_carries_its_base() -> None:
    ours, calls = compiler()

    data = asyncio.run(ours.compile((1, 2, 3), PROVENANCE))

    manifest = decode(data, "sha256:x").manifest
    assert len(calls) == 4, "start, two steps, result"
    assert (manifest.num_virtual_tokens, manifest.first_position) == (3, 3)
    assert manifest.base_model.fingerprint == TINY_BASE.fingerprint
    assert manifest.source["format"] == "prompt"


def test_a_soft_prompt_is_baked_without_a_claim_on_its_base() -> None:
    soft = SoftPrompt(torch.zeros(5, 24), Provenance("peft", Recognition("a soft prompt")))

    data = asyncio.run(compiler()[0].bake(soft))

    assert decode(data, "sha256:x").manifest.base_model.fingerprint is None


@pytest.mark.parametrize(
    ("ids", "base", "error", "message"),
    [
        ((), TINY_BASE, InvalidParameter, "at least one token"),
        ((1, 100), TINY_BASE, InvalidParameter, "expected token ids 0 to 99"),
        ((-1,), TINY_BASE, InvalidParameter, "expected token ids 0 to 99"),
        ((1,) * 17, TINY_BASE, ContextTooLong, "17 tokens; a prefix .* has at most 16"),
        ((1,) * 9, replace(TINY_BASE, position_limit=9), ContextTooLong, "at most 8"),
    ],
)
def test_a_prompt_that_can_not_be_a_prefix_is_refused_before_the_model_is_asked(
    ids: tuple[int, ...], base: BaseSpec, error: type[Exception], message: str
) -> None:
    ours, calls = compiler(base)
    with pytest.raises(error, match=message):
        asyncio.run(ours.compile(ids, PROVENANCE))
    assert calls == []
