"""What is wrong with the settings, in words of whoever made them. Called by `server.config`."""

from __future__ import annotations

from pydantic import ValidationError


def describe(error: ValidationError, env_prefix: str, secrets: frozenset[str]) -> str:
    """One line per bad setting, under all the names that a user may know it by; never a secret's value."""
    lines = []
    for fault in error.errors(include_url=False, include_context=False):
        name = str(fault["loc"][0])
        got = "" if name in secrets else f" (got {str(fault['input'])[:80]!r})"
        flag = f"--{name.replace('_', '-')} / {env_prefix}{name.upper()}"
        message = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{flag}: {message}{got}")
        if str(fault["input"]).startswith("tcp://"):
            # A Kubernetes Service called "prefixd" puts its own PREFIXD_PORT into every pod.
            lines.append("Kubernetes set this variable: use enableServiceLinks: false")
    return "\n".join(lines)
