"""Which weights a prefix was trained on."""

from __future__ import annotations

import re
import time

import torch

from prefix_store.fingerprint import base_fingerprint


def model(seed: int = 0, width: int = 50) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(width, 3), torch.nn.LayerNorm(3))


def test_the_same_weights_agree_in_float32_and_bfloat16() -> None:
    expected = base_fingerprint(model())
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", expected)
    assert base_fingerprint(model()) == expected
    assert base_fingerprint(model().to(torch.bfloat16)) == expected


def test_weights_saved_as_bfloat16_agree_when_loaded_as_float32() -> None:
    saved = model().to(torch.bfloat16)
    expected = base_fingerprint(saved)
    assert base_fingerprint(saved.to(torch.float32)) == expected


def test_other_weights_other_names_and_other_shapes_differ() -> None:
    found = {
        base_fingerprint(model()),
        base_fingerprint(model(seed=1)),
        base_fingerprint(model(width=51)),
    }
    found.add(base_fingerprint(torch.nn.ModuleDict({"a": model()})))
    assert len(found) == 4


def test_first_and_last_value_of_a_large_tensor_are_in_the_sample() -> None:
    for index in (0, -1):
        changed = model()
        with torch.no_grad():
            weight = next(changed.parameters()).view(-1)
            weight[index] += 1
        assert base_fingerprint(changed) != base_fingerprint(model())


def test_the_cost_does_not_grow_with_the_weights() -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(torch.zeros(1).expand(10**9) for _ in range(290))

    started = time.monotonic()
    base_fingerprint(Wide())
    assert time.monotonic() - started < 2  # well under a second on an idle machine
