"""How many connections this process may have open. Main thread, once, before the runs."""

from __future__ import annotations

import resource
from typing import Final

from loadtest.errors import BadLoad

RESERVED: Final = 64  # files, the loop's own, and what asks for metrics meanwhile
ENOUGH: Final = 65_000  # about the ports that one address has for connections to one server


def max_open_streams(asked: int | None) -> int:
    """Raises the soft limit as far as it goes; the streams that fit. Raises `BadLoad` if `asked` are too many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (ENOUGH if asked is None else asked) + RESERVED
    ceiling = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < ceiling:
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
        soft = ceiling
    fit = ENOUGH if soft == resource.RLIM_INFINITY else min(soft - RESERVED, ENOUGH)
    if asked is not None and asked > fit:
        raise BadLoad(
            f"--max-open {asked}: this process may open {soft} descriptors (ulimit -n), "
            f"which leaves {fit} for streams"
        )
    if fit < 1:
        raise BadLoad(
            f"this process may open {soft} descriptors (ulimit -n), expected more than {RESERVED}"
        )
    return fit if asked is None else asked
