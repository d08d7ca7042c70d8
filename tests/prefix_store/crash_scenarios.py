"""Histories of a store, to be crashed everywhere, and what must be found after it.

A scenario is a preparation, all of which is durable, and acts, each a change that is acknowledged when it returns.
Called by `crash`; those of the audit log are in `crash_audit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prefix_store.backends import durable_files
from prefix_store.backends.filesystem import FilesystemBackend
from prefix_store.errors import PrefixRejected, PrefixUnavailable
from prefix_store.spec import TaskInfo
from prefix_store.store import PrefixStore
from tests.prefix_store.builders import TINY_BASE, make_artifact
from tests.prefix_store.crash_points import CrashFault, Point, installed, moments
from tests.prefix_store.simulated_files import Disk, Effect, SimulatedOs

STORE: Final = Path("/srv/made/store")
NAMES: Final = ("task", "other", "new")
ONE, TWO, THREE, FOUR = (make_artifact(num_virtual_tokens=1, seed=seed) for seed in range(4))


@dataclass(frozen=True)
class StoreState:
    """`numbers`: versions that each of `NAMES` has had. `unreadable`: damaged blobs of versions that are there."""

    tasks: tuple[TaskInfo, ...]
    numbers: tuple[int, ...]
    unreadable: frozenset[str]

    def __hash__(self) -> int:
        return hash((self.numbers, self.unreadable))

    @classmethod
    def of(cls, store: PrefixStore) -> StoreState:
        digests = {version.digest for task in store.tasks() for version in task.versions}
        return cls(
            tasks=tuple(store.tasks()),
            numbers=tuple(store.num_versions_ever(name) for name in NAMES),
            unreadable=frozenset(digest for digest in digests if not is_readable(store, digest)),
        )

    def permits(self, found: StoreState) -> bool:
        """A blob that was damaged before may be damaged, missing, or healed already."""
        same = (self.tasks, self.numbers) == (found.tasks, found.numbers)
        return same and found.unreadable <= self.unreadable


def is_readable(store: PrefixStore, digest: str) -> bool:
    try:
        return store.load(digest).prefix.digest == digest
    except PrefixUnavailable:
        return False


class StoreSubject:
    """`PrefixStore` over its directory."""

    def recover(self, allowed: tuple[StoreState, ...]) -> StoreState:
        store = open_store()
        found = StoreState.of(store)
        if not any(state.permits(found) for state in allowed):
            raise CrashFault(f"found {found}\nallowed {allowed}")
        if store.num_broken_tasks:
            raise CrashFault("a version log is broken")
        check_directory(store)
        store._catalog.check_invariants()
        return found

    def go_on(self) -> StoreState:
        store = open_store()
        for task, data in (("task", FOUR), ("new", FOUR), ("new", ONE)):
            number = store.num_versions_ever(task)
            put = store.put(task, data)
            if put.created and put.version.version != number + 1:
                raise CrashFault(f"version {put.version.version} after {number}")
        store.rollback("new")
        return StoreState.of(store)


def open_store() -> PrefixStore:
    return PrefixStore.open(STORE, TINY_BASE, host_cache_bytes=0)


def check_directory(store: PrefixStore) -> None:
    """Nothing lies there that nobody asked for: stagings, and blobs that no version names."""
    leftovers = durable_files.names_in(STORE / "tmp")
    named = {v.digest: v.size_bytes for task in store.tasks() for v in task.versions}
    if leftovers or store.stats().disk_entries > len(named):
        raise CrashFault(f"in tmp {leftovers}; {store.stats().disk_entries} blobs, {len(named)}")


class History:
    """A store that lives through a scenario. `points`: the crash points so far."""

    def __init__(self) -> None:
        self.simulated = SimulatedOs(Disk())
        self.points: list[Point] = []
        self.store: PrefixStore | None = None

    def act(self, change: Callable[[PrefixStore], object]) -> None:
        """Make a change; what it raises must be a refusal, and changes nothing."""
        before = self.state()
        store = self.store
        assert store is not None

        def attempt() -> None:
            try:
                change(store)
            except PrefixRejected:
                return

        self._record(attempt, before)

    def open(self) -> None:
        """A new process opens the store that the last one left."""
        before = StoreState((), (0,) * len(NAMES), frozenset())
        if self.store is not None:
            before = self.state()
        self._record(self._open, before)

    def prepare(self, *changes: Callable[[PrefixStore], object]) -> None:
        """Without crash points, and durable."""
        self.open()
        for change in changes:
            self.act(change)
        self.simulated.make_all_durable()
        self.points.clear()

    def damage(self, data: bytes) -> None:
        """Change a byte of a stored blob."""
        disk = self.simulated.disk()
        for inode in [inode for inode, content in disk.files.items() if content == data]:
            fault = Effect(inode, "write", offset=len(data) - 1, data=b"\xff")
            self.simulated.happen(fault)
        self.simulated.make_all_durable()

    def state(self) -> StoreState:
        """What readers see now."""
        store = self.store
        assert store is not None
        with installed(self.simulated):
            return StoreState.of(store)

    def _open(self) -> None:
        if self.store is not None:
            self.store.close()
        self.store = open_store()

    def _record(self, run: Callable[[], None], before: StoreState) -> None:
        _, disks = moments(self.simulated, run)
        after = self.state()
        self.points += [Point(disk, (before, after)) for disk in disks]
        self.points.append(Point(self.simulated.disk(), (after,)))


def put(task: str, data: bytes, *, activate: bool = True) -> Callable[[PrefixStore], object]:
    return lambda store: store.put(task, data, activate=activate)


def delete(task: str) -> Callable[[PrefixStore], object]:
    return lambda store: [store.free(digest) for digest in store.delete(task)]


def promote(number: int) -> Callable[[PrefixStore], object]:
    return lambda store: store.promote("task", number)


def opening_a_new_store(history: History) -> None:
    history.open()


def first_upload(history: History) -> None:
    history.prepare()
    history.act(put("task", ONE))


def second_version(history: History) -> None:
    history.prepare(put("task", ONE))
    history.act(put("task", TWO))


def the_same_bytes_again(history: History) -> None:
    history.prepare(put("task", ONE), put("task", TWO))
    history.act(put("task", TWO))
    history.act(put("task", ONE))


def the_same_bytes_under_another_task(history: History) -> None:
    history.prepare(put("task", ONE))
    history.act(put("other", ONE))


def upload_without_activation(history: History) -> None:
    history.prepare(put("task", ONE))
    history.act(put("task", TWO, activate=False))
    history.act(put("other", THREE, activate=False))


def promotion_and_rollback(history: History) -> None:
    history.prepare(put("task", ONE), put("task", TWO), put("task", THREE))
    history.act(promote(1))
    history.act(lambda store: store.rollback("task"))
    history.act(lambda store: store.rollback("task"))


def canary(history: History) -> None:
    history.prepare(put("task", ONE), put("task", TWO))
    history.act(lambda store: store.set_canary("task", 1, 0.25))
    history.act(lambda store: store.set_canary("task", 1, 0.5))
    history.act(lambda store: store.end_canary("task"))
    history.act(lambda store: store.set_canary("task", 1, 1.0))
    history.act(promote(1))


def deletion(history: History) -> None:
    history.prepare(put("task", ONE), put("task", TWO), put("other", TWO))
    history.act(delete("task"))
    history.act(delete("other"))


def upload_after_deletion(history: History) -> None:
    history.prepare(put("task", ONE))
    history.act(delete("task"))
    history.act(put("task", ONE))


def refused_upload(history: History) -> None:
    history.prepare(put("task", ONE))
    history.act(put("task", TWO[:-1]))
    history.act(put("other", b"nothing of the kind"))


def healing_a_damaged_blob(history: History) -> None:
    history.prepare(put("task", ONE), put("other", ONE))
    history.damage(ONE)
    history.act(put("task", ONE))


def sweep_at_opening(history: History) -> None:
    """A blob that no version names, as a crash between the two steps of an upload leaves it, and a staging."""
    history.prepare(put("task", ONE))
    store = history.store
    assert store is not None

    def leave_behind() -> None:
        store.close()
        backend = FilesystemBackend(STORE)
        staged = backend.stage()
        staged.write(THREE)
        staged.publish()
        backend.stage().write(TWO)
        backend.close()

    with installed(history.simulated):
        leave_behind()
    history.open()


def a_long_history(history: History) -> None:
    """Nothing of the first acts is synced by the way, as the preparations of the others are."""
    history.open()
    for change in (
        put("task", ONE), put("task", TWO, activate=False), promote(2), put("other", TWO),
        delete("task"), put("task", THREE), delete("other"), put("task", TWO),
    ):  # fmt: skip
        history.act(change)
    history.open()
    history.act(put("other", ONE))


STORE_SCENARIOS: Final = {
    scenario.__name__: scenario
    for scenario in (
        opening_a_new_store, first_upload, second_version, the_same_bytes_again,
        the_same_bytes_under_another_task, upload_without_activation, promotion_and_rollback,
        canary, deletion, upload_after_deletion, refused_upload, healing_a_damaged_blob,
        sweep_at_opening, a_long_history,
    )
}  # fmt: skip


def store_points(name: str) -> list[Point]:
    """The crash points of a scenario."""
    history = History()
    STORE_SCENARIOS[name](history)
    return history.points
