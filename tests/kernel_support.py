"""Where the tests of GPU kernels run: on a GPU if there is one, else in Triton's interpreter, else not."""

from __future__ import annotations

import importlib.util
from typing import Final

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs the package triton: make test-kernels",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KERNEL_DEVICE: Final = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(backend: str) -> torch.device:
    """Where a backend of attention is tested."""
    return KERNEL_DEVICE if backend == "triton" else torch.device("cpu")
