"""Numbers that JSON has no word for, as null. Pure; called by whoever writes JSON of measured values."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """The same with null for NaN and infinities, at any depth; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
