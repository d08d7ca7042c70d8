"""What can go wrong in the trainer through the caller's or the world's fault, as named exceptions."""

from __future__ import annotations

from server.errors import PrefixdError


class TrainerError(PrefixdError):
    """Root of everything the trainer raises on purpose."""
