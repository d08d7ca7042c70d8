"""Version logs against a slow, obvious twin, and damage that must never show an older version."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from prefix_store import records
from prefix_store.backends.memory import MemoryBackend
from prefix_store.catalog import Catalog, Publication
from prefix_store.errors import (
    InvalidTaskName,
    NoSuchMove,
    PreconditionFailed,
    PrefixUnavailable,
    StoreFull,
    UnknownTask,
    UnknownVersion,
)
from prefix_store.spec import PrefixManifest, PrefixVersion, TaskInfo
from tests.prefix_store.conftest import OpenBackend

MANIFEST = PrefixManifest(num_virtual_tokens=3, k_space="none", model_type="gpt2")
DIGESTS = [f"sha256:{index:x}" + 63 * "0" for index in range(4)]
DIGESTS += ["sha256:" + "c" * 63 + "d"]


class FailingBackend(MemoryBackend):
    """Refuses an append when told to."""

    full = False

    def append_record(self, log: str, index: int, payload: bytes) -> None:
        if self.full:
            raise StoreFull("no room")
        super().append_record(log, index, payload)


def publish(catalog: Catalog, task: str, digest: str, **conditions: Any) -> Publication:
    return catalog.publish(task, digest, 10, MANIFEST, **conditions)


@dataclass
class TwinTask:
    """All that ever happened to a task, to be gone through from the start for every question."""

    events: list[tuple[str, Any]] = field(default_factory=list)

    def versions(self) -> dict[int, str]:
        """Number -> digest of what can be named: published, and not before the last delete."""
        found: dict[int, str] = {}
        number = 0
        for kind, value in self.events:
            if kind == "version":
                number += 1
                found[number] = value
            elif kind == "delete":
                found = {}
        return found

    def lives(self) -> list[int]:
        moves: list[int] = []
        for kind, value in self.events:
            if kind == "live":
                moves.append(value)
            elif kind == "rollback":
                moves.pop()
            elif kind == "delete":
                moves = []
        return moves

    def canary(self) -> tuple[int, float] | None:
        """The last trial that was begun, unless it ended, passed, or was deleted since."""
        for position in range(len(self.events) - 1, -1, -1):
            kind, value = self.events[position]
            if kind in ("end", "delete"):
                return None
            if kind == "canary":
                after = [TwinTask(self.events[:n]) for n in range(position, len(self.events) + 1)]
                passed = value[0] in [then.lives()[-1] for then in after if then.lives()]
                return None if passed else value
        return None

    def live(self) -> int | None:
        return self.lives()[-1] if self.lives() else None

    def grants(self) -> set[str]:
        found: set[str] = set()
        for kind, value in self.events:
            if kind == "delete":
                found = set()
            elif kind == "grant":
                found = found | {value}
            elif kind == "end_grant":
                found = found - {value}
        return found


CAUGHT = (UnknownTask, UnknownVersion, PreconditionFailed, StoreFull, NoSuchMove)


def outcome(call: Callable[..., object], *args: object, **conditions: object) -> object:
    """What `call` returns, or the type of what it raises."""
    try:
        return call(*args, **conditions)
    except CAUGHT as error:
        return type(error)


class Pair:
    """The catalog and its twin under the same random operations."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.backend = FailingBackend()
        self.catalog = Catalog(self.backend)
        self.twins = {task: TwinTask() for task in "ab"}

    def step(self) -> None:
        self.backend.full = self.rng.random() < 0.1
        task = self.rng.choice("ab")
        twin = self.twins[task]
        operations = [self.publish] * 3 + [self.promote, self.rollback, self.canary, self.end]
        operations += [self.grant, self.end_grant]
        operations += [self.delete] if self.rng.random() < 0.3 else []
        self.rng.choice(operations)(task, twin)
        if self.rng.random() < 0.05:
            self.catalog = Catalog(self.backend)
        self.catalog.check_invariants()
        self.compare()

    def if_match(self) -> str | None:
        return self.rng.choice([None, None, None, None, "*", self.rng.choice(DIGESTS)])

    def refused(self, present: int | None, if_match: str | None, twin: TwinTask) -> bool:
        return if_match is not None and (
            present is None or if_match not in ("*", twin.versions()[present])
        )

    def settle(self, got: object, expected: object, twin: TwinTask, *events: Any) -> None:
        """`expected` is a type that is raised, or what is returned when the disk has room."""
        if isinstance(expected, type):
            assert got is expected
        elif events and self.backend.full:
            assert got is StoreFull
        else:
            assert got == expected
            twin.events += events

    def publish(self, task: str, twin: TwinTask) -> None:
        digest, if_match = self.rng.choice(DIGESTS), self.if_match()
        fresh, activate = self.rng.random() < 0.1, self.rng.random() < 0.6
        conditions = {"if_match": if_match, "if_none_match": fresh, "activate": activate}
        got = outcome(publish, self.catalog, task, digest, **conditions)
        if isinstance(got, Publication):
            got = (got.version.version, got.created, got.activated)
        known = [n for n, d in twin.versions().items() if d == digest]
        number = known[0] if known else sum(kind == "version" for kind, _ in twin.events) + 1
        moves = activate and twin.live() != number
        events: list[tuple[str, Any]] = [] if known else [("version", digest)]
        events += [("live", number)] if moves else []
        expected: object = (number, not known, moves)
        if self.refused(twin.live(), if_match, twin) or (fresh and twin.versions()):
            expected = PreconditionFailed
        self.settle(got, expected, twin, *events)

    def promote(self, task: str, twin: TwinTask) -> None:
        number, if_match = self.rng.randint(1, 6), self.if_match()
        got = outcome(self.catalog.promote, task, number, if_match=if_match)
        moves = twin.live() != number
        expected: object = moves
        if number not in twin.versions():
            expected = UnknownVersion if twin.versions() else UnknownTask
        elif self.refused(twin.live(), if_match, twin):
            expected = PreconditionFailed
        self.settle(got, expected, twin, *([("live", number)] if moves else []))

    def rollback(self, task: str, twin: TwinTask) -> None:
        if_match = self.if_match()
        got = outcome(self.catalog.rollback, task, if_match=if_match)
        lives = twin.lives()
        expected: object = lives[-2] if len(lives) > 1 else NoSuchMove
        if not twin.versions():
            expected = UnknownTask
        elif self.refused(twin.live(), if_match, twin):
            expected = PreconditionFailed
        got = got.version if isinstance(got, PrefixVersion) else got
        self.settle(got, expected, twin, ("rollback", None))

    def canary(self, task: str, twin: TwinTask) -> None:
        number, weight = self.rng.randint(1, 6), self.rng.choice([0.0, 0.1, 1.0])
        if_match, fresh = self.if_match(), self.rng.random() < 0.1
        conditions = {"if_match": if_match, "if_none_match": fresh}
        got = outcome(self.catalog.set_canary, task, number, weight, **conditions)
        present = twin.canary()
        expected: object = present != (number, weight)
        if number not in twin.versions():
            expected = UnknownVersion if twin.versions() else UnknownTask
        elif (fresh and present) or self.refused(present and present[0], if_match, twin):
            expected = PreconditionFailed
        elif number == twin.live():
            expected = NoSuchMove
        self.settle(got, expected, twin, *([("canary", (number, weight))] if expected else []))

    def end(self, task: str, twin: TwinTask) -> None:
        if_match = self.if_match()
        got = outcome(self.catalog.end_canary, task, if_match=if_match)
        present = twin.canary()
        expected: object = None
        if not twin.versions():
            expected = UnknownTask
        elif present is None:
            expected = UnknownVersion
        elif self.refused(present[0], if_match, twin):
            expected = PreconditionFailed
        self.settle(got, expected, twin, ("end", None))

    def grant(self, task: str, twin: TwinTask) -> None:
        tenant = self.rng.choice(["acme", "beta", ""])
        got = outcome(self.catalog.grant, task, tenant)
        new = bool(tenant) and tenant not in twin.grants()  # these tasks are the operator's own
        expected: object = new if twin.versions() else UnknownTask
        self.settle(got, expected, twin, *([("grant", tenant)] if new else []))

    def end_grant(self, task: str, twin: TwinTask) -> None:
        tenant = self.rng.choice(["acme", "beta"])
        got = outcome(self.catalog.end_grant, task, tenant)
        there = tenant in twin.grants()
        expected: object = there if twin.versions() else UnknownTask
        self.settle(got, expected, twin, *([("end_grant", tenant)] if there else []))

    def delete(self, task: str, twin: TwinTask) -> None:
        if_match = self.if_match()
        got = outcome(self.catalog.delete, task, if_match=if_match)
        expected: object = list(twin.versions().items())
        if not twin.versions():
            expected = UnknownTask
        elif self.refused(twin.live(), if_match, twin):
            expected = PreconditionFailed
        if isinstance(got, tuple):
            got = [(v.version, v.digest) for v in got]
        self.settle(got, expected, twin, ("delete", None))

    def compare(self) -> None:
        present = {task: twin for task, twin in self.twins.items() if twin.versions()}
        infos = self.catalog.tasks()
        assert [info.name for info in infos] == sorted(present)
        for info in infos:
            twin = present[info.name]
            assert {v.version: v.digest for v in info.versions} == twin.versions()
            assert (info.live and info.live.version) == twin.live()
            lives = twin.lives()
            assert (info.previous and info.previous.version) == (lives[-2] if lives[1:] else None)
            canary = info.canary and (info.canary.version.version, info.canary.weight)
            assert canary == twin.canary()
            assert set(info.grants) == self.catalog.grants(info.name) == twin.grants()
            self.compare_references(info, twin)
        named = {digest for twin in present.values() for digest in twin.versions().values()}
        assert self.catalog.referenced_digests() == named

    def compare_references(self, info: TaskInfo, twin: TwinTask) -> None:
        task, catalog = info.name, self.catalog
        assert catalog.task(task) == info
        for version in info.versions:
            assert catalog.is_named(version)
            assert catalog.get(task, f"v{version.version}") is version
            assert catalog.get(task, version.digest) is version
        canary = twin.canary()
        for alias, number in (("live", twin.live()), ("canary", canary and canary[0])):
            found = outcome(catalog.get, task, alias)
            assert getattr(found, "version", found) == (number or UnknownVersion)
        hidden = info.versions[0].version - 1
        with pytest.raises(UnknownVersion):
            catalog.get(task, f"v{hidden}" if hidden else "v0")


@pytest.mark.parametrize("seed", range(10))
def test_random_operations_agree_with_the_twin(seed: int) -> None:
    pair = Pair(seed)
    for _ in range(120):
        pair.step()


def old_log(*digests: str) -> MemoryBackend:
    """A log as the first release wrote it: every upload a `publish`, also of bytes that were there before."""
    backend = MemoryBackend()
    prev = records.GENESIS
    for index, digest in enumerate(digests, start=1):
        text = (
            f'{{"index":{index},"prev":"{prev}","task":"task","created_at":"2026-11-01T00:00:00.000+00:00",'
            f'"kind":"publish","version":{index},"digest":"{digest}","size_bytes":10,'
            f'"manifest":{MANIFEST.model_dump_json()}}}'
        )
        backend.append_record(LOG, index, text.encode())
        prev = records.chain_hash(text.encode())
    return backend


def test_a_log_from_before_aliases_is_read_and_goes_on() -> None:
    backend = old_log(DIGESTS[0], DIGESTS[1], DIGESTS[0])
    catalog = Catalog(backend)
    assert catalog.live("task").version == 3
    assert catalog.rollback("task").version == 2
    assert catalog.rollback("task").version == 1
    assert publish(catalog, "task", DIGESTS[0]) == (catalog.live("task"), False, False)
    assert publish(catalog, "task", DIGESTS[2], activate=False).version.version == 4
    assert Catalog(backend).task("task") == catalog.task("task")


def test_the_same_bytes_are_the_same_version_and_live_moves_to_it() -> None:
    catalog = Catalog(MemoryBackend())
    first = publish(catalog, "task", DIGESTS[0]).version
    publish(catalog, "task", DIGESTS[1])

    assert publish(catalog, "task", DIGESTS[0], activate=False) == (first, False, False)
    assert catalog.live("task").version == 2
    assert publish(catalog, "task", DIGESTS[0]) == (first, False, True)
    assert catalog.live("task") == first
    assert len(catalog.task("task").versions) == 2


def test_a_task_whose_versions_were_only_stored_has_no_bare_name() -> None:
    catalog = Catalog(MemoryBackend())
    publish(catalog, "task", DIGESTS[0], activate=False)
    with pytest.raises(UnknownVersion, match="no live version; promote one"):
        catalog.live("task")
    assert catalog.get("task", "v1").version == 1
    with pytest.raises(PreconditionFailed, match="exists already"):
        publish(catalog, "task", DIGESTS[1], if_none_match=True)
    catalog.promote("task", 1)
    assert catalog.live("task").version == 1


def test_a_replay_restores_every_field(open_backend: OpenBackend) -> None:
    manifest = PrefixManifest(
        num_virtual_tokens=3,
        k_space="post_rope",
        model_type="llama",
        rope_theta=1e6,
        token_start=7,
        description="naïve – \u2028",
        training={"steps": 3, "lr": 1e-3, "note": None, "nested": [{"a": True}]},
    )
    version, *_ = Catalog(open_backend()).publish("task", DIGESTS[0], 10, manifest)
    assert version.manifest == manifest
    assert Catalog(open_backend()).live("task") == version
    assert version.ref == "task@v1"


def test_a_digest_prefix_must_be_long_enough_and_fit_one_version() -> None:
    catalog = Catalog(MemoryBackend())
    first = "sha256:" + "a" * 20 + "b" * 44
    second = "sha256:" + "a" * 20 + "c" * 44
    publish(catalog, "task", first)
    publish(catalog, "task", second)
    assert catalog.get("task", first[:28]).digest == first
    for selector, message in [
        (first[:27], "fits several"),
        (first[:18], r"expected v<number>, live, canary or sha256"),
        ("sha256:" + "0" * 12, "has no version"),
        ("v3", "has no version"),
        ("v0", "expected v<number>"),
        ("v01", "expected v<number>"),
        ("v" + "9" * 100, "expected v<number>"),
        ("", "expected v<number>"),
        ("latest", "expected v<number>, live, canary"),
        ("canary", "has no version 'canary'"),
    ]:
        with pytest.raises(UnknownVersion, match=message):
            catalog.get("task", selector)


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "a..b", "a/b", "a\n", "a" * 64, "ä", "a b", "../x", "a\0"]
)
def test_a_bad_task_name_is_refused_everywhere(name: str) -> None:
    catalog = Catalog(MemoryBackend())
    for call in (catalog.live, catalog.task, catalog.delete):
        with pytest.raises(InvalidTaskName):
            call(name)
    with pytest.raises(InvalidTaskName):
        publish(catalog, name, DIGESTS[0])


def test_of_many_concurrent_first_publications_exactly_one_creates() -> None:
    catalog = Catalog(MemoryBackend())
    created = []

    def race(digest: str) -> None:
        with contextlib.suppress(PreconditionFailed):
            created.append(publish(catalog, "task", digest, if_none_match=True)[0].digest)

    threads = [threading.Thread(target=race, args=(digest,)) for digest in DIGESTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert created == [catalog.live("task").digest]
    assert catalog.live("task").version == 1
    catalog.check_invariants()


LOG = records.log_name("task")


def damaged(change: Callable[[dict[int, bytes]], object]) -> MemoryBackend:
    """Three versions of `task` and one of `other`, with `task`'s records changed."""
    backend = MemoryBackend()
    catalog = Catalog(backend)
    for digest in DIGESTS[:3]:
        publish(catalog, "task", digest)
    publish(catalog, "other", DIGESTS[3])
    change(backend.logs[LOG])
    return backend


def edit(log: dict[int, bytes], at: int, **fields: Any) -> None:
    """Sealed anew, so that something else than the seal must notice it."""
    record = json.loads(log[at]) | fields
    del record["sha256"]
    log[at] = records.sealed(json.dumps(record).encode())


def follow(log: dict[int, bytes], **fields: Any) -> None:
    """A record that continues the chain; what it says is up to the caller."""
    end = len(log)
    frame = {"index": end + 1, "prev": records.chain_hash(log[end]), "task": "task"}
    log[end + 1] = records.sealed(json.dumps({**frame, "created_at": "now", **fields}).encode())


DAMAGE: dict[str, Callable[[dict[int, bytes]], object]] = {
    "first record lost": lambda log: log.pop(1),
    "middle record lost": lambda log: log.pop(2),
    "record unreadable": lambda log: log.update({3: b""}),
    "record truncated": lambda log: log.update({3: log[3][:-1]}),
    "seal of another record": lambda log: log.update({3: log[3][:-66] + log[2][-66:]}),
    "seal cut off": lambda log: log.update({2: records.load(log[2]).model_dump_json().encode()}),
    "records swapped": lambda log: log.update({1: log[2], 2: log[1]}),
    "digest edited": lambda log: edit(log, 1, digest=DIGESTS[3]),
    "last digest made malformed": lambda log: edit(log, 3, digest="sha256:../../etc/passwd"),
    "unknown field": lambda log: edit(log, 3, note="x"),
    "another kind": lambda log: edit(log, 3, kind="rename"),
    "promotes what is not there": lambda log: follow(log, kind="promote", version=4),
    "rolls back to what was not live": lambda log: follow(log, kind="rollback", version=1),
    "canary that is live": lambda log: follow(log, kind="canary", version=3, weight=0.5),
    "canary that is not there": lambda log: follow(log, kind="canary", version=9, weight=0.5),
    "weight above one": lambda log: follow(log, kind="canary", version=1, weight=1.5),
    "version skipped": lambda log: edit(log, 3, version=4),
    "wrong task": lambda log: edit(log, 3, task="other"),
    "wrong index": lambda log: edit(log, 3, index=4),
    "broken chain": lambda log: edit(log, 3, prev="0" * 64),
    "record of another log": lambda log: log.update({4: log[1]}),
    "record zero": lambda log: log.update({0: log[1]}),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_log_makes_its_task_unavailable_and_no_other(
    change: Callable[[dict[int, bytes]], object], caplog: pytest.LogCaptureFixture
) -> None:
    backend = damaged(change)
    before = backend.read_logs()
    catalog = Catalog(backend)
    assert [record.args and record.args[0] for record in caplog.records] == [LOG]  # type: ignore[index]
    assert catalog.num_broken() == 1
    assert [info.name for info in catalog.tasks()] == ["other"]
    for call in (
        lambda: catalog.live("task"),
        lambda: catalog.get("task", "v1"),
        lambda: catalog.task("task"),
        lambda: catalog.delete("task"),
        lambda: publish(catalog, "task", DIGESTS[4]),
    ):
        with pytest.raises(PrefixUnavailable, match="log of task 'task' is damaged"):
            call()
    assert publish(catalog, "other", DIGESTS[4])[1]
    assert backend.read_logs()[LOG] == before[LOG]
    catalog.check_invariants()


def test_a_directory_without_records_is_no_task() -> None:
    """A process killed between making the directory and linking the first record leaves one."""
    backend = MemoryBackend()
    backend.logs[LOG] = {}
    catalog = Catalog(backend)
    assert catalog.tasks() == []
    assert catalog.num_broken() == 0
    assert publish(catalog, "task", DIGESTS[0])[0].version == 1


# ---- tenants -------------------------------------------------------------------------------------


def test_a_grant_lasts_and_is_not_given_to_the_owner() -> None:
    backend = MemoryBackend()
    catalog = Catalog(backend)
    publish(catalog, "acme~task", DIGESTS[0])

    assert catalog.grant("acme~task", "beta")
    assert not catalog.grant("acme~task", "beta")
    assert not catalog.grant("acme~task", "acme")
    assert Catalog(backend).task("acme~task").grants == ("beta",)
    assert catalog.end_grant("acme~task", "beta")
    assert not catalog.end_grant("acme~task", "beta")
    assert Catalog(backend).task("acme~task").grants == ()


def test_to_ask_for_a_grant_of_what_is_not_there_or_damaged_is_no_error() -> None:
    backend = MemoryBackend()
    publish(Catalog(backend), "acme~task", DIGESTS[0])
    backend.logs[records.log_name("acme~task")][1] = b""
    catalog = Catalog(backend)

    for name in ("acme~task", "acme~nothing", "no name at all"):
        assert catalog.grants(name) == frozenset()
    assert catalog.is_taken("acme~task")
    assert not catalog.is_taken("acme~nothing")


def test_each_tenant_has_an_index_of_the_names_that_it_may_write() -> None:
    catalog = Catalog(MemoryBackend())
    for name in ("poet", "acme~poet", "acme~clerk", "beta~x"):
        publish(catalog, name, DIGESTS[0])
    publish(catalog, "beta~stored", DIGESTS[0], activate=False)
    catalog.grant("beta~x", "acme")

    names = catalog.names()
    assert names.everything == ("acme~clerk", "acme~poet", "beta~x", "poet")
    assert names.seen_by("acme") == ("beta~x", "clerk", "poet")
    assert names.seen_by("beta") == ("x",)
    assert names.seen_by("") == ("poet",)
    assert names.seen_by("gamma") == ()
    assert catalog.names() is names
    catalog.end_grant("beta~x", "acme")
    assert catalog.names().seen_by("acme") == ("clerk", "poet")
