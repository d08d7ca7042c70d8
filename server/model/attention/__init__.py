"""Attention backends by name. Called by `server.bootstrap`; a factory imports its backend on first use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import torch

from server.errors import ConfigError
from server.model.attention.base import AttentionBackend

logger = logging.getLogger(__name__)

_CPU: Final = torch.device("cpu")
_OLDEST_CAPABILITY: Final = (8, 0)  # Ampere: bfloat16 products


def _reference(_: torch.device) -> AttentionBackend:
    from server.model.attention.reference import ReferenceAttention

    return ReferenceAttention()


def _sdpa(_: torch.device) -> AttentionBackend:
    from server.model.attention.sdpa import SdpaAttention

    return SdpaAttention()


def _triton(device: torch.device) -> AttentionBackend:
    try:
        from server.model.attention.triton import TritonAttention, is_interpreted
    except ImportError as error:
        raise ConfigError(
            f"attention: triton needs the package triton, which can not be imported ({error}); torch for CUDA "
            "brings it, and so does the extra prefixd[kernels]"
        ) from error
    if is_interpreted() and device.type == "cpu":
        return TritonAttention()
    if device.type != "cuda":
        raise ConfigError(f"attention: triton needs a CUDA device, got {device.type}; use sdpa")
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        raise ConfigError(
            "attention: triton needs a GPU of compute capability 8.0 or later, got "
            f"{'.'.join(map(str, capability))}; use sdpa"
        )
    return TritonAttention()


ATTENTION_BACKENDS: Final[dict[str, Callable[[torch.device], AttentionBackend]]] = {
    "reference": _reference,
    "sdpa": _sdpa,
    "triton": _triton,
}


def make_attention_backend(name: str, device: torch.device = _CPU) -> AttentionBackend:
    """The backend called `name` for a model on `device`; "auto" takes the fastest that runs there.

    Raises `ConfigError` for a name that is none, and for a backend that this device or installation has not.
    """
    if name == "auto":
        return _fastest(device)
    if name not in ATTENTION_BACKENDS:
        valid = ", ".join(["auto", *ATTENTION_BACKENDS])
        raise ConfigError(f"attention: expected one of {valid}, got {name!r}")
    return ATTENTION_BACKENDS[name](device)


def _fastest(device: torch.device) -> AttentionBackend:
    if device.type == "cuda":
        try:
            return _triton(device)
        except ConfigError as error:
            logger.warning("attention falls back to sdpa, which is slower here: %s", error)
    return _sdpa(device)
