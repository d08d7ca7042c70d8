"""What can go wrong before, or instead of, a measurement. A request that fails while one runs is a result, not an error."""

from __future__ import annotations

from server.errors import PrefixdError


class LoadTestError(PrefixdError):
    """Nothing can be measured, and why."""


class BadLoad(LoadTestError):
    """A flag that makes no traffic, or none that this server can take."""
