"""What operators ask of the device tier: warm, evict, pin, unpin, report.

Owned by the engine thread; the scheduler hands it every message that is no request's and no load's.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.messages import (
    Answer,
    EvictPrefix,
    FollowPin,
    Message,
    PinTask,
    ReportDevice,
    UnpinTask,
    WarmPrefix,
)
from server.engine.prefix_loads import PrefixLoads
from server.kvcache.pins import Pins
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.types import PinState, PrefixRef


@dataclass(frozen=True, slots=True)
class DeviceOrders:
    """Carries out orders on the parts that keep what is resident, pinned, wished for and cached."""

    prefixes: ResidentPrefixes
    pins: Pins
    loads: PrefixLoads
    prompt_cache: PromptCache

    def carry_out(self, message: Message, now: float) -> Answer | None:
        """The answer, to an order that has one."""
        match message:
            case WarmPrefix(ref):
                self.loads.wish(ref)
            case EvictPrefix(digest):
                self.give_up(digest)
                self.prefixes.retire(digest)
            case PinTask(ticket, ref, ttl):
                state = self.pins.pin(ref, None if ttl is None else now + ttl)
                return self._pinned(ticket, ref, state)
            case FollowPin(ticket, ref):
                return self._pinned(ticket, ref, self.pins.follow(ref))
            case UnpinTask(task):
                self.pins.lift(task)
            case ReportDevice(ticket):
                idle = self.prompt_cache.num_evictable_blocks
                return Answer(ticket, self.pins.report(now, idle))
        return None

    def give_up(self, digest: str) -> None:
        """Nobody but requests asks for this prefix any more."""
        self.loads.wished.pop(digest, None)
        self.pins.lift_digest(digest)

    def _pinned(self, ticket: int, ref: PrefixRef, state: PinState | None) -> Answer:
        if state is not None and state.refusal is None:
            self.loads.wish(ref)
        return Answer(ticket, state)
