"""Which tasks an operator keeps resident, until when, and how much of the pool that may take.

Owned by the engine thread, driven by the scheduler, which hands in the time. A pin belongs to a task and
follows it to its next live version; the blocks are counted once however many tasks pin the same bytes. The
marks on the resident prefixes are kept equal to what is written here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.kvcache.block_pool import BlockPool
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.types import DeviceReport, PinState, PrefixRef, Resident


@dataclass(frozen=True, slots=True)
class Pin:
    """`expires_at`: on the scheduler's clock; None for ever."""

    ref: PrefixRef
    expires_at: float | None


class Pins:
    """Task -> pin. Invariants: the pinned prefixes take at most `budget_blocks`; a resident prefix is
    marked as pinned exactly when a pin is on its digest.
    """

    def __init__(self, blocks: BlockPool, prefixes: ResidentPrefixes, budget_blocks: int) -> None:
        self.budget_blocks = budget_blocks
        self._blocks = blocks
        self._prefixes = prefixes
        self._pins: dict[str, Pin] = {}

    def __contains__(self, digest: str) -> bool:
        return any(pin.ref.digest == digest for pin in self._pins.values())

    @property
    def num_blocks(self) -> int:
        """Blocks that the pinned prefixes take, or will once they are loaded."""
        return self._blocks_of(self._pins.values())

    def digests(self) -> set[str]:
        """What is pinned."""
        return {pin.ref.digest for pin in self._pins.values()}

    def seconds_left(self, digest: str, now: float) -> float | None:
        """Until the last pin on `digest` ends; None for never."""
        ends = [pin.expires_at for pin in self._pins.values() if pin.ref.digest == digest]
        finite = [end for end in ends if end is not None]
        return max(finite) - now if ends and len(finite) == len(ends) else None

    def pin(self, ref: PrefixRef, expires_at: float | None) -> PinState:
        """Pins a task's version, or says why not; then an earlier pin of the task stays as it was."""
        changed = {**self._pins, ref.task: Pin(ref, expires_at)}
        needed = self._blocks_of(changed.values())
        if needed > self.budget_blocks:
            return self._state(
                f"with task {ref.task!r} pinned prefixes would hold {needed} of the pool's "
                f"{self._blocks.capacity} KV blocks; the budget is {self.budget_blocks} (pin_budget)"
            )
        self._replace(changed)
        return self._state(None)

    def follow(self, ref: PrefixRef) -> PinState | None:
        """Moves the pin of a task to its new live version, or gives it up if that does not fit.

        None if the task is not pinned.
        """
        pin = self._pins.get(ref.task)
        if pin is None:
            return None
        state = self.pin(ref, pin.expires_at)
        if state.refusal is not None:
            self.lift(ref.task)
        return state

    def lift(self, task: str) -> None:
        """Ends the pin of a task, if there is one."""
        self._replace({name: pin for name, pin in self._pins.items() if name != task})

    def lift_digest(self, digest: str) -> None:
        """Ends every pin on these bytes."""
        self._replace({n: pin for n, pin in self._pins.items() if pin.ref.digest != digest})

    def expire(self, now: float) -> None:
        """Ends the pins whose time is over."""
        if any(pin.expires_at is not None and pin.expires_at <= now for pin in self._pins.values()):
            self._replace(
                {n: p for n, p in self._pins.items() if p.expires_at is None or p.expires_at > now}
            )

    def report(self, now: float, num_idle_blocks: int) -> DeviceReport:
        """The pool and what is resident in it, with the pins. `num_idle_blocks` are held, and count as free."""
        residents = [
            Resident(
                ref=entry.ref,
                num_blocks=len(entry.block_ids),
                num_leases=entry.num_leases,
                pinned=entry.pinned,
                pin_seconds_left=self.seconds_left(entry.ref.digest, now),
            )
            for entry in self._prefixes.entries()
        ]
        return DeviceReport(
            num_blocks=self._blocks.capacity,
            num_blocks_used=self._blocks.num_used - num_idle_blocks,
            num_pinned_blocks=self.num_blocks,
            pin_budget_blocks=self.budget_blocks,
            residents=tuple(residents),
        )

    def mark(self, digest: str) -> None:
        """Makes the mark on a resident prefix right; called when one has become resident."""
        if digest in self._prefixes:
            change = self._prefixes.pin if digest in self else self._prefixes.unpin
            change(digest)

    def check_invariants(self) -> None:
        """Recomputes the class invariants from scratch; for tests and the debug loop."""
        assert self.num_blocks <= self.budget_blocks
        for entry in self._prefixes.entries():
            assert entry.pinned == (entry.ref.digest in self), "a pin was lost or invented"
        assert all(task == pin.ref.task for task, pin in self._pins.items())

    def _replace(self, pins: dict[str, Pin]) -> None:
        before = self.digests()
        self._pins = pins
        for digest in before ^ self.digests():
            self.mark(digest)

    def _blocks_of(self, pins: Iterable[Pin]) -> int:
        lengths = {pin.ref.digest: pin.ref.num_virtual_tokens for pin in pins}
        return sum(map(self._blocks.blocks_for, lengths.values()))

    def _state(self, refusal: str | None) -> PinState:
        return PinState(refusal, self.num_blocks, self.budget_blocks)
