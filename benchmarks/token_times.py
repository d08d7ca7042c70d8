"""Step times read from the outside: from the moments at which tokens came. Standard library only.

For contestants whose steps can not be asked: another process, another program. Also used inside other
environments, where the rest of this package does not import.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def steady_gaps(token_seconds: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Seconds from token to token of the first request, while all requests were decoding.

    `token_seconds`: for each request, when its tokens came. Before the last request's first token a step may
    have computed prompts as well; after the first request's end it had fewer rows.
    """
    begin = max(times[0] for times in token_seconds)
    end = min(times[-1] for times in token_seconds)
    steady = [t for t in token_seconds[0] if begin <= t <= end]
    return tuple(b - a for a, b in pairwise(steady))
