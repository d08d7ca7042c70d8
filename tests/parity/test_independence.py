"""The second promise: a request's logits are the same to the bit, alone and among others. See `independence.py`."""

from __future__ import annotations

import pytest
import torch

from tests.parity.independence import MODELS, Laboratory

# 208 in all: 26 for each of four models in two dtypes.
TRIALS = 26


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_a_request_gives_the_same_logits_alone_and_in_any_batch_chunked_preempted_and_cached(
    model: str, dtype: torch.dtype
) -> None:
    laboratory = Laboratory(model, dtype)

    faults = {seed: laboratory.trial(seed) for seed in range(TRIALS)}

    assert {seed: fault for seed, fault in faults.items() if fault is not None} == {}
    assert laboratory.num_preemptions >= 5, "too few preemptions to prove anything"
    assert laboratory.num_hit_tokens >= 500, "too few cached tokens to prove anything"


def test_the_experiment_notices_one_bit() -> None:
    laboratory = Laboratory("llama", torch.float32)
    key = next(k for k, v in laboratory.alone.items() if k[1] == 0)
    changed = laboratory.alone[key].clone()
    changed[0] = torch.nextafter(changed[0], torch.tensor(torch.inf))
    laboratory.alone[key] = changed

    assert any(
        fault is not None and fault.startswith(f"{key[0]}, token 0:")
        for fault in map(laboratory.trial, range(12))
    )
