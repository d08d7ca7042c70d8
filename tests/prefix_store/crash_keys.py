"""Histories of API keys, to be crashed everywhere, and what must be found after it. Called by `crash`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from prefix_store.backends import durable_files
from prefix_store.key_store import KeyStore
from prefix_store.keys import KeyScope
from tests.prefix_store.crash_points import CrashFault, Point, installed, moments
from tests.prefix_store.simulated_files import Disk, SimulatedOs

DIRECTORY: Final = Path("/store/keys")
_INFER: Final = frozenset({KeyScope.INFER})

Keys = tuple[tuple[str, bool, bool], ...]
"""Of each key its note, whether it was revoked, and whether it was rotated: the state of a store of keys."""


def state_of(keys: KeyStore) -> Keys:
    return tuple(
        (k.note, k.revoked_at is not None, k.replaced_by is not None) for k in keys.listed()
    )


class KeySubject:
    """`KeyStore` over its directory."""

    def recover(self, allowed: tuple[Keys, ...]) -> Keys:
        found = state_of(KeyStore(DIRECTORY))
        if found not in allowed:
            raise CrashFault(f"found {found}, allowed {allowed}")
        return found

    def go_on(self) -> Keys:
        keys = KeyStore(DIRECTORY)
        keys.revoke(keys.create("acme", _INFER, note="later").key.id)
        keys.rotate(keys.create("acme", _INFER, note="last").key.id, overlap_seconds=1)
        return state_of(keys)


class KeyHistory:
    """Keys that live through a scenario. `points`: the crash points so far."""

    def __init__(self) -> None:
        self.simulated = SimulatedOs(Disk())
        self.points: list[Point] = []
        self._keys: KeyStore | None = None
        with installed(self.simulated):
            durable_files.make_dir(DIRECTORY.parent)

    @property
    def keys(self) -> KeyStore:
        assert self._keys is not None
        return self._keys

    def open(self) -> None:
        """A new process opens what the last one left."""

        def run() -> None:
            self._keys = KeyStore(DIRECTORY)

        self.record(run)

    def create(self, note: str) -> None:
        self.record(lambda: self.keys.create("acme", _INFER, note=note))

    def rotate(self, number: int) -> None:
        key_id = self.keys.listed()[number].id
        self.record(lambda: self.keys.rotate(key_id, overlap_seconds=60))

    def revoke(self, number: int) -> None:
        key_id = self.keys.listed()[number].id
        self.record(lambda: self.keys.revoke(key_id))

    def record(self, run: Callable[[], object]) -> None:
        """Every moment of `run` may be the last one; what was before it or is after it is found then."""
        before = state_of(self._keys) if self._keys else ()
        _, disks = moments(self.simulated, run)
        after = state_of(self.keys)
        self.points += [Point(disk, (before, after)) for disk in disks]
        self.points.append(Point(self.simulated.disk(), (after,)))


def the_first_key(history: KeyHistory) -> None:
    history.open()
    history.create("first")


def keys_of_several_processes(history: KeyHistory) -> None:
    for number in range(3):
        history.open()
        history.create(str(number))


def a_rotation_and_a_revocation(history: KeyHistory) -> None:
    history.open()
    history.create("old")
    history.rotate(0)
    history.open()
    history.revoke(0)


KEY_SCENARIOS: Final = {
    scenario.__name__: scenario
    for scenario in (the_first_key, keys_of_several_processes, a_rotation_and_a_revocation)
}


def key_points(name: str) -> list[Point]:
    """The crash points of a scenario."""
    history = KeyHistory()
    KEY_SCENARIOS[name](history)
    return history.points
