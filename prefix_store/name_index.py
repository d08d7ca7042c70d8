"""The names of tasks, sorted, as the operator and as each tenant writes them: what a mistyped name is compared with.

Immutable; made by `catalog` once for each of its states, on whichever thread first asks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set

from prefix_store.spec import tenant_of


class NameIndex:
    """`everything`: all full names. A tenant sees its own without its name before them, and what was granted to it."""

    def __init__(self, tasks: Iterable[tuple[str, Set[str]]]) -> None:
        """`tasks`: the full name of each, and to whom it is granted."""
        seen: defaultdict[str, list[str]] = defaultdict(list)
        names = []
        for name, grants in tasks:
            names.append(name)
            seen[tenant_of(name)].append(name.partition("~")[2] or name)
            for tenant in grants:
                seen[tenant].append(name)
        self.everything = tuple(sorted(names))
        self._seen = {tenant: tuple(sorted(theirs)) for tenant, theirs in seen.items()}

    def seen_by(self, tenant: str) -> tuple[str, ...]:
        """The names that `tenant` may use, as it may write them."""
        return self._seen.get(tenant, ())
