"""Whose turn it is: each tenant's share of the work, by virtual token counters (VTC, Sheng et al., OSDI 2024).

Owned by the engine thread, kept by the scheduler. A tenant's counter is what was done for it, in tokens over its weight; who has the
least is served next. So tenants that always have something waiting get work in proportion to their weights, whatever the size
and number of their requests, and who asks for little does not wait behind who asks for much.

A tenant that had nothing waiting has no claim on the past: when it comes back its counter is lifted to the least of those who wait,
or, if nobody does, to that of who was served last.

Nobody is served while another who waits has a lower counter. So the counters of two tenants that wait differ by no more than one of them can
be charged after its turn came: what the requests of a full pool may generate, and one prompt (the paper's lemma 4.3).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Final

from server.engine.sequence import Sequence
from server.types import GenerationRequest

PROMPT_TOKEN: Final = 1.0
"""What a token costs that was computed for a tenant at once with others, or loaded for it with a prefix."""
OUTPUT_TOKEN: Final = 2.0
"""What a token costs that was generated: it takes a step of its own, if in company."""


class FairShares:
    """The counters of all tenants that anything was done for. A tenant's weight comes with its requests."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._waiting: frozenset[str] = frozenset()
        self._last_served = ""
        self._least_weight = 1.0

    def counter(self, tenant: str) -> float:
        """Who has the least is served next; who has the most gives way first."""
        return self._counters.get(tenant, 0.0)

    def join(self, tenants: Iterable[str]) -> None:
        """These have something that could run now."""
        floor = min(map(self.counter, self._waiting), default=self.counter(self._last_served))
        for tenant in set(tenants) - self._waiting:
            self._counters[tenant] = max(self.counter(tenant), floor)

    def in_turn(self, waiting: Iterable[Sequence]) -> Iterator[Sequence]:
        """Sequences by whose turn it is, each tenant's in the order given. Counters may change in between."""
        queues = _by_tenant(waiting)
        while queues:
            tenant = min(queues, key=self.counter)
            yield queues[tenant].popleft()
            if not queues[tenant]:
                del queues[tenant]

    def serve(self, request: GenerationRequest, cost: float) -> None:
        """Its tenant's turn came, and so much of the work was begun."""
        self.charge(request, cost)
        self._last_served = request.tenant

    def charge(self, request: GenerationRequest, cost: float) -> None:
        """So much was done for it since its turn came."""
        counter = self.counter(request.tenant) + cost / request.tenant_weight
        self._counters[request.tenant] = counter
        self._least_weight = min(self._least_weight, request.tenant_weight)

    def keep_waiting(self, tenants: Iterable[str]) -> None:
        """These and no others found no room."""
        self._waiting = frozenset(tenants)

    def forget(self) -> None:
        """Nothing runs and nothing waits: everybody is equal again."""
        self._counters.clear()
        self._waiting = frozenset()
        self._least_weight = 1.0

    def check_invariants(self, most_after_a_turn: float) -> None:
        """For tests and the debug loop. The argument: what a tenant may be charged for its turn and behind it."""
        if self._waiting:
            counters = [self.counter(tenant) for tenant in self._waiting]
            bound = most_after_a_turn / self._least_weight
            assert max(counters) - min(counters) <= bound, "one who waits was passed over"


def by_turns(waiting: Iterable[Sequence]) -> Iterator[Sequence]:
    """One of each tenant, then another of each: who is looked after ahead of their turn."""
    queues = _by_tenant(waiting)
    while queues:
        for tenant in list(queues):
            yield queues[tenant].popleft()
            if not queues[tenant]:
                del queues[tenant]


def _by_tenant(waiting: Iterable[Sequence]) -> dict[str, deque[Sequence]]:
    """Each tenant's sequences in the order given; tenants in that of their first."""
    queues: defaultdict[str, deque[Sequence]] = defaultdict(deque)
    for seq in waiting:
        queues[seq.request.tenant].append(seq)
    return queues
