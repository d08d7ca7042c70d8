"""From the memory that there is to what the KV pool may take: one subtraction, each term by name.

Made at start by `server.sizing`; shown by the banner, the log, the metrics and every refusal for want of memory.
Pure: what is measured is measured by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What takes memory beside the pool. `setting` makes it less; empty if none does."""

    name: str
    num_bytes: int
    setting: str = ""


@dataclass(frozen=True, slots=True)
class MemoryAccount:
    """`total_bytes` x `share` may be taken, `uses` take of it, the KV pool may have what is left.

    `share_setting` makes the share larger; empty where none does.
    """

    source: str
    total_bytes: int
    share: float
    uses: tuple[MemoryUse, ...]
    share_setting: str = ""

    @property
    def budget_bytes(self) -> int:
        return int(self.total_bytes * self.share)

    @property
    def used_bytes(self) -> int:
        return sum(use.num_bytes for use in self.uses)

    @property
    def left_bytes(self) -> int:
        """For the pool; negative where the rest takes more than there is."""
        return self.budget_bytes - self.used_bytes

    def with_use(self, use: MemoryUse) -> MemoryAccount:
        """This account with one more line."""
        uses = (*self.uses, use)
        return MemoryAccount(self.source, self.total_bytes, self.share, uses, self.share_setting)

    def lines(self) -> list[str]:
        """A column of figures, one term a line."""
        rows = [(self.source, self.total_bytes), (f"x {self.share:g}", self.budget_bytes)]
        rows += [(f"- {use.name}", use.num_bytes) for use in self.uses]
        rows.append(("= left for the KV pool", self.left_bytes))
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {readable(num_bytes):>9}" for name, num_bytes in rows]

    def __str__(self) -> str:
        """The same in one line."""
        uses = "".join(f" - {use.name} {readable(use.num_bytes)}" for use in self.uses)
        return (
            f"{self.source} {readable(self.total_bytes)} x {self.share:g}{uses} "
            f"= {readable(self.left_bytes)}"
        )

    def remedy(self) -> str:
        """The settings that leave more, the one that takes most first."""
        ordered = sorted(self.uses, key=lambda use: -use.num_bytes)
        lower = dict.fromkeys(use.setting for use in ordered if use.setting and use.num_bytes)
        raised = [f"raise {self.share_setting}"] if self.share_setting else []
        return ", or ".join([*raised, *([f"lower {' or '.join(lower)}"] if lower else [])])


def readable(num_bytes: int) -> str:
    """Decimal, as memory is sold: 16.1 GB, 988.1 MB."""
    if abs(num_bytes) >= 10**9:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.1f} MB"
