"""Version logs against a slow, obvious twin, and damage that must never show an older version."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from prefix_store import records
from prefix_store.backends.memory import MemoryBackend
from prefix_store.catalog import Catalog
from prefix_store.errors import (
    InvalidTaskName,
    PreconditionFailed,
    PrefixUnavailable,
    StoreFull,
    UnknownTask,
    UnknownVersion,
)
from prefix_store.spec import PrefixManifest, PrefixVersion
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


def publish(
    catalog: Catalog, task: str, digest: str, **conditions: Any
) -> tuple[PrefixVersion, bool]:
    return catalog.publish(task, digest, 10, MANIFEST, **conditions)


class Twin:
    """What the catalog should say: per task all versions ever, and how many of them were deleted."""

    def __init__(self) -> None:
        self.history: dict[str, list[str]] = {}
        self.deleted: dict[str, int] = {}

    def visible(self, task: str) -> list[tuple[int, str]]:
        numbered = list(enumerate(self.history.get(task, []), start=1))
        return numbered[self.deleted.get(task, 0) :]


def outcome(call: Callable[..., object], *args: object, **conditions: object) -> object:
    """What `call` returns, or the type of what it raises."""
    try:
        return call(*args, **conditions)
    except (UnknownTask, PreconditionFailed, StoreFull) as error:
        return type(error)


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_agree_with_the_twin(seed: int) -> None:
    rng = random.Random(seed)
    backend = FailingBackend()
    catalog = Catalog(backend)
    twin = Twin()
    for _ in range(150):
        task, digest = rng.choice("abc"), rng.choice(DIGESTS)
        visible = twin.visible(task)
        live = visible[-1][1] if visible else None
        backend.full = rng.random() < 0.1
        if_match = rng.choice([None, None, None, "*", digest])
        unmatched = if_match is not None and (live is None or if_match not in ("*", live))
        match rng.choice(["publish", "publish", "publish", "delete", "reopen"]):
            case "publish":
                fresh = rng.random() < 0.2
                conditions = {"if_match": if_match, "if_none_match": fresh}
                got = outcome(publish, catalog, task, digest, **conditions)
                if unmatched or (fresh and live is not None):
                    assert got is PreconditionFailed
                elif live == digest:
                    assert isinstance(got, tuple)
                    assert got[1] is False
                elif backend.full:
                    assert got is StoreFull
                else:
                    assert isinstance(got, tuple)
                    assert got[1] is True
                    twin.history.setdefault(task, []).append(digest)
            case "delete":
                got = outcome(catalog.delete, task, if_match=if_match)
                if live is None:
                    assert got is UnknownTask
                elif unmatched:
                    assert got is PreconditionFailed
                elif backend.full:
                    assert got is StoreFull
                else:
                    assert got is None
                    twin.deleted[task] = len(twin.history[task])
            case "reopen":
                catalog = Catalog(backend)
        catalog.check_invariants()
        assert_agrees(catalog, twin)


def assert_agrees(catalog: Catalog, twin: Twin) -> None:
    expected = {task: twin.visible(task) for task in "abc" if twin.visible(task)}
    infos = catalog.tasks()
    assert [info.name for info in infos] == sorted(expected)
    for info in infos:
        assert [(v.version, v.digest) for v in info.versions] == expected[info.name]
        assert info.live is info.versions[-1]
        assert catalog.task(info.name) == info
        for version in info.versions:
            assert catalog.get(info.name, f"v{version.version}") is version
            latest = max(v.version for v in info.versions if v.digest == version.digest)
            assert catalog.get(info.name, version.digest).version == latest
        hidden = info.versions[0].version - 1
        with pytest.raises(UnknownVersion):
            catalog.get(info.name, f"v{hidden}" if hidden else "v0")
    assert catalog.referenced_digests() == {d for seen in expected.values() for _, d in seen}


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
    version, _ = Catalog(open_backend()).publish("task", DIGESTS[0], 10, manifest)
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
        (first[:18], r"expected v<number> or sha256"),
        ("sha256:" + "0" * 12, "has no version"),
        ("v3", "has no version"),
        ("v0", "expected v<number>"),
        ("v01", "expected v<number>"),
        ("v" + "9" * 100, "expected v<number>"),
        ("", "expected v<number>"),
        ("latest", "expected v<number>"),
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
    log[at] = json.dumps(json.loads(log[at]) | fields).encode()


DAMAGE: dict[str, Callable[[dict[int, bytes]], object]] = {
    "first record lost": lambda log: log.pop(1),
    "middle record lost": lambda log: log.pop(2),
    "record unreadable": lambda log: log.update({3: b""}),
    "record truncated": lambda log: log.update({3: log[3][:-1]}),
    "records swapped": lambda log: log.update({1: log[2], 2: log[1]}),
    "digest edited": lambda log: edit(log, 1, digest=DIGESTS[3]),
    "last digest made malformed": lambda log: edit(log, 3, digest="sha256:../../etc/passwd"),
    "unknown field": lambda log: edit(log, 3, note="x"),
    "another kind": lambda log: edit(log, 3, kind="rename"),
    "version skipped": lambda log: edit(log, 3, version=4),
    "wrong task": lambda log: edit(log, 3, task="other"),
    "wrong index": lambda log: edit(log, 3, index=4),
    "broken chain": lambda log: edit(log, 3, prev="0" * 64),
    "record of another log": lambda log: log.update({4: log[1]}),
    "record zero": lambda log: log.update({0: log[1]}),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_log_makes_its_task_unavailable_and_no_other(
    change: Callable[[dict[int, bytes]], object],
) -> None:
    backend = damaged(change)
    before = backend.read_logs()
    catalog = Catalog(backend)
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
