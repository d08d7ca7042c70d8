"""What a task must look like after the changes that were acknowledged: a slow and obvious twin of the version log.

Written from the documentation of the admin API, not from `prefix_store`. Immutable: a change gives the task after it,
so the one before is still there when nobody learns whether the change happened. Called by `kill_loop`'s clients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class View:
    """A task as `GET /admin/v1/tasks/{task}` shows it. `versions`: number and digest, oldest first."""

    live: int | None
    previous: int | None
    canary: tuple[int, float] | None
    versions: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, answer: dict[str, Any]) -> View:
        """From the body of that answer."""
        canary = answer["canary"]
        return cls(
            live=answer["live"],
            previous=answer["previous"],
            canary=canary and (canary["version"], canary["weight"]),
            versions=tuple((v["version"], v["digest"]) for v in reversed(answer["versions"])),
        )


@dataclass(frozen=True, slots=True)
class ExpectedTask:
    """`num_versions`: all that ever were, deleted ones too. `lives`: those that were live, the present one last."""

    num_versions: int = 0
    versions: tuple[tuple[int, str], ...] = ()
    lives: tuple[int, ...] = ()
    canary: tuple[int, float] | None = None

    @property
    def live(self) -> int | None:
        return self.lives[-1] if self.lives else None

    @property
    def view(self) -> View | None:
        """None: there is no such task."""
        if not self.versions:
            return None
        previous = self.lives[-2] if len(self.lives) > 1 else None
        return View(self.live, previous, self.canary, self.versions)

    def number_of(self, digest: str) -> int | None:
        """The version of these bytes; the same bytes are the same version."""
        return next((number for number, other in self.versions if other == digest), None)

    def uploaded(self, digest: str, *, activate: bool) -> ExpectedTask:
        number = self.number_of(digest)
        if number is not None:
            return self.promoted(number) if activate else self
        number = self.num_versions + 1
        stored = replace(self, num_versions=number, versions=(*self.versions, (number, digest)))
        return stored.promoted(number) if activate else stored

    def promoted(self, number: int) -> ExpectedTask:
        """A canary that becomes live is the canary no more; what is live already stays."""
        if number == self.live:
            return self
        return self._with_lives((*self.lives, number))

    def rolled_back(self) -> ExpectedTask:
        return self._with_lives(self.lives[:-1])

    def on_trial(self, number: int, weight: float) -> ExpectedTask:
        return replace(self, canary=(number, weight))

    def without_canary(self) -> ExpectedTask:
        return replace(self, canary=None)

    def deleted(self) -> ExpectedTask:
        """Numbers go on where they were."""
        return ExpectedTask(num_versions=self.num_versions)

    def _with_lives(self, lives: tuple[int, ...]) -> ExpectedTask:
        passed = self.canary is not None and self.canary[0] == lives[-1]
        return replace(self, lives=lives, canary=None if passed else self.canary)
