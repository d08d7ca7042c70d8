"""The fingerprint of a base model's weights: which model a prefix was trained on.

A prefix loads without complaint on any model of the same shape and then produces nonsense; names and
revisions do not help, since they can be wrong. This reads a fixed sample of every parameter, so it costs
well under a second. Called at start-up by the server and by trainers, on the thread that loaded the model.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch

SAMPLES_PER_TENSOR: Final = 64


def base_fingerprint(model: torch.nn.Module) -> str:
    """`sha256:<hex>` over name, shape and up to 64 values of every named parameter.

    Values are rounded to bfloat16 first, so that float32 and bfloat16 loads of the same weights agree.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(f"{name}{list(parameter.shape)}\0".encode())
        sha.update(_sample(parameter.detach()))
    return f"sha256:{sha.hexdigest()}"


def _sample(tensor: torch.Tensor) -> bytes:
    """Values spread evenly over the tensor, first and last among them, as bfloat16 bytes."""
    flat = tensor.reshape(-1)
    count = min(SAMPLES_PER_TENSOR, flat.numel())
    # Integers: a float step loses whole positions beyond 2^24 elements.
    indices = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)
    sample = flat[indices.to(flat.device)].to(torch.bfloat16).cpu()
    return sample.view(torch.uint8).numpy().tobytes()
