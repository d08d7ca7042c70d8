"""Attention backends by name. Called by `server.bootstrap`; a factory imports its backend on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from server.errors import ConfigError
from server.model.attention.base import AttentionBackend


def _reference() -> AttentionBackend:
    from server.model.attention.reference import ReferenceAttention

    return ReferenceAttention()


def _sdpa() -> AttentionBackend:
    from server.model.attention.sdpa import SdpaAttention

    return SdpaAttention()


ATTENTION_BACKENDS: Final[dict[str, Callable[[], AttentionBackend]]] = {
    "reference": _reference,
    "sdpa": _sdpa,
}


def make_attention_backend(name: str) -> AttentionBackend:
    """The backend called `name`; "auto" takes the fastest that runs everywhere."""
    chosen = "sdpa" if name == "auto" else name
    if chosen not in ATTENTION_BACKENDS:
        valid = ", ".join(["auto", *ATTENTION_BACKENDS])
        raise ConfigError(f"attention: expected one of {valid}, got {name!r}")
    return ATTENTION_BACKENDS[chosen]()
