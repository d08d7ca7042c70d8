"""Which requests a canary takes: a stated share, and the same user always the same side.

A pure function; called by the HTTP layer for each request that names a task without a version.
"""

from __future__ import annotations

import hashlib
from typing import Final

_RANGE: Final = 2**64


def takes_canary(task: str, version: int, weight: float, key: str) -> bool:
    """Whether the request with this key goes to the canary `version` of `task`.

    The hash places the key in 0..1, evenly and for ever; the canary takes what lies below `weight`. So a
    larger weight only adds users, and another canary draws other ones.
    """
    seed = f"{task}\0{version}\0{key}".encode("utf-8", "surrogatepass")
    place = int.from_bytes(hashlib.sha256(seed).digest()[:8], "big")
    return place < weight * _RANGE
