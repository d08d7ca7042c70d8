"""What a trial of a prefix on the resident model showed: for the answer to an upload, and for `prefixd verify`.

Frozen values without torch. Made by `server.model.prover` on the engine thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

NO_PROBE: Final = "behaviour: the artifact carries no probe, so nothing shows that it does here what it did where it was made"


@dataclass(frozen=True, slots=True)
class Proof:
    """A prefix that passed: its own row was finite, and the row beside it stayed the same to the bit.

    `probe_difference`: how far the probe's log-probabilities were off, in nats, of at most
    `probe_tolerance`; None without a probe.
    """

    probe_difference: float | None = None
    probe_tolerance: float | None = None

    @property
    def unverified(self) -> tuple[str, ...]:
        """What could not be shown."""
        return (NO_PROBE,) if self.probe_difference is None else ()

    def as_answer(self) -> dict[str, Any]:
        """The same for people and programmes that asked for it."""
        probe = None
        if self.probe_difference is not None and self.probe_tolerance is not None:
            probe = {
                "max_difference_nats": round(self.probe_difference, 6),
                "tolerance_nats": self.probe_tolerance,
            }
        return {"smoke": "passed", "probe": probe}
