"""Prefixes on their way to the device: asked for, come, and those that somebody wishes there before a request does.

Owned by the engine thread, kept by the scheduler, which finds the blocks. A prefix is absent, loading, staged (its tensors are in
host memory, and `EngineCore` holds them) or resident (`ResidentPrefixes`).
"""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.step_plan import StepPlan
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.types import PrefixRef, PrefixTier


class PrefixLoads:
    """`max_in_flight` bounds those loading and staged, which are what takes host memory beside the store's cache."""

    def __init__(self, prefixes: ResidentPrefixes, max_in_flight: int) -> None:
        self._prefixes = prefixes
        self._max_in_flight = max_in_flight
        self.loading: set[str] = set()
        self.staged: dict[str, PrefixTier] = {}
        self.wished: dict[str, PrefixRef] = {}

    def at_hand(self, digest: str) -> bool:
        """Whether a sequence could start with it, given the blocks."""
        return digest in self._prefixes or digest in self.staged

    def tier(self, digest: str) -> PrefixTier:
        """Where one that is at hand was found."""
        return self.staged.get(digest, PrefixTier.DEVICE)

    def request(self, ref: PrefixRef, step: StepPlan) -> None:
        """Has a prefix loaded unless it already is, or too many are under way."""
        if self.may_request(ref.digest):
            self.loading.add(ref.digest)
            step.prefix_requests.append(ref)

    def may_request(self, digest: str) -> bool:
        """Whether a request for it would be made now."""
        in_flight = len(self.loading) + len(self.staged)
        return digest not in self.loading and in_flight < self._max_in_flight

    def came(self, digest: str, tier: PrefixTier) -> bool:
        """Loading -> staged; False for one that nobody waits for."""
        if digest not in self.loading:
            return False
        self.loading.remove(digest)
        self.staged[digest] = tier
        return True

    def wish(self, ref: PrefixRef) -> None:
        """It is to become resident without a request."""
        if ref.digest not in self._prefixes:
            self.wished[ref.digest] = ref

    def take(self, digest: str) -> None:
        """Staged -> resident, for the scheduler has blocks for it."""
        del self.staged[digest]
        self.wished.pop(digest, None)

    def keep_only(self, digests: Iterable[str | None]) -> None:
        """Forgets staged prefixes that nobody wishes, and that are not among these."""
        wanted = {*digests, *self.wished}
        for digest in [d for d in self.staged if d not in wanted]:
            del self.staged[digest]

    def check_invariants(self) -> None:
        """For tests and the debug loop."""
        for digest in [*self.loading, *self.staged]:
            assert digest not in self._prefixes, "a prefix is in one state"
        assert not self.loading & self.staged.keys()
