"""Which names a mistyped one may have been meant to be, at a cost that does not grow with their number.

Pure; called by `store` on whichever thread answers for an unknown name, the event loop among them: a fuzzy
comparison takes up to 0.3 ms, so only a few names are compared, those that stand around the mistyped one in
the order of names, and those that contain it or are contained in it.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from typing import Final

MAX_CANDIDATES: Final = 16
_MAX_LEN: Final = 64


def similar_names(name: str, names: Sequence[str], limit: int) -> list[str]:
    """Up to `limit` of the sorted `names` that are close to `name`, the closest first."""
    name = name[:_MAX_LEN]
    return difflib.get_close_matches(name, candidates(name, names), n=limit)


def candidates(name: str, names: Sequence[str]) -> list[str]:
    """The at most `MAX_CANDIDATES` of the sorted `names` that are worth a comparison."""
    if not name or len(names) <= MAX_CANDIDATES:
        return list(names[:MAX_CANDIDATES])
    quarter = MAX_CANDIDATES // 4
    contained = islice((other for other in names if other in name), quarter)
    containing = islice((other for other in names if name in other), quarter)
    around = bisect_left(names, name)
    neighbours = names[max(around - quarter, 0) : around + quarter]
    return list(dict.fromkeys([*neighbours, *contained, *containing]))
