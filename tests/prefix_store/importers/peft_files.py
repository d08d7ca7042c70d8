"""Bare PEFT adapter files from tensors, as PEFT's own saver lays them out."""

from __future__ import annotations

import torch
from safetensors.torch import save
from torch import Tensor


def peft_file(metadata: dict[str, str] | None = None, /, **tensors: Tensor) -> bytes:
    data: bytes = save(tensors, {"format": "pt"} if metadata is None else metadata)
    return data


def prompt(num_tokens: int, width: int, *, seed: int = 0, dtype: str = "float32") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, width, generator=generator).to(getattr(torch, dtype))
