"""`PrefixStore` as its users see it, over both backends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefix_store.artifact import Prefix, encode
from prefix_store.catalog import Catalog
from prefix_store.errors import (
    ArtifactTooLarge,
    DigestMismatch,
    IncompatiblePrefix,
    InvalidTaskName,
    MalformedArtifact,
    NoSuchMove,
    PreconditionFailed,
    PrefixUnavailable,
    StoreFailed,
    StoreFull,
    StoreLocked,
    UnknownTask,
    UnknownVersion,
)
from prefix_store.records import log_name
from prefix_store.spec import BaseSpec, Canary, digest_of
from prefix_store.store import PrefixStore
from prefix_store.upload import Upload
from prefix_store.validation import Limits
from tests.prefix_store.builders import TINY_BASE, base_with, make_artifact, manifest_for, random_kv
from tests.prefix_store.conftest import OpenBackend

OpenStore = Callable[..., PrefixStore]


@pytest.fixture
def open_store(open_backend: OpenBackend) -> OpenStore:
    """Opens the same place again, each time for the base that is asked for."""

    def open_again(base: BaseSpec = TINY_BASE, *, host_cache_bytes: int = 1 << 20) -> PrefixStore:
        limits = Limits(max_num_virtual_tokens=16)
        return PrefixStore(open_backend(), base, limits, host_cache_bytes=host_cache_bytes)

    return open_again


def test_what_is_read_from_disk_is_kept_in_the_form_that_was_asked_for_and_made_once(
    open_backend: OpenBackend,
) -> None:
    made: list[Prefix] = []

    def keep_as(prefix: Prefix) -> Prefix:
        made.append(prefix.to("bfloat16"))
        return made[-1]

    limits = Limits(max_num_virtual_tokens=16)
    store = PrefixStore(
        open_backend(), TINY_BASE, limits, host_cache_bytes=1 << 20, keep_as=keep_as
    )
    data = make_artifact(num_virtual_tokens=5, seed=3)
    store.put("task", data)

    loaded = [store.load(digest_of(data)) for _ in range(2)]

    assert [prefix for prefix, _ in loaded] == [made[0], made[0]]
    assert [from_host for _, from_host in loaded] == [False, True]


def test_what_was_put_is_resolved_and_loaded_in_the_serving_dtype(open_store: OpenStore) -> None:
    store = open_store(base_with(dtype="bfloat16"))
    data = make_artifact(num_virtual_tokens=5, seed=3)

    result = store.put("task", data)

    assert result.created
    assert result.warnings == ()
    assert result.version == store.resolve("task")
    assert result.version.digest == digest_of(data)
    assert result.version.size_bytes == len(data)
    assert result.version.manifest.num_virtual_tokens == 5
    prefix, from_host = store.load(digest_of(data))
    keys, _ = random_kv(TINY_BASE, 5, seed=3)
    assert not from_host
    assert torch.equal(prefix.keys[1], keys[1].bfloat16())
    assert store.load(digest_of(data)) == (prefix, True)
    assert store.is_on_host(digest_of(data))


def test_everything_is_there_after_reopening(open_store: OpenStore) -> None:
    store = open_store()
    for seed in range(3):
        store.put("task", make_artifact(seed=seed))
    store.put("other", make_artifact(seed=9))
    expected = store.tasks()

    store = open_store()

    assert store.tasks() == expected
    for info in expected:
        for version in info.versions:
            assert store.load(version.digest).prefix.digest == version.digest
    assert store.stats().disk_entries == 4


def test_references_name_the_live_version_a_number_or_a_digest(open_store: OpenStore) -> None:
    store = open_store()
    first, second = (store.put("task", make_artifact(seed=seed)).version for seed in (1, 2))
    assert store.resolve("task") == store.resolve("task@live") == second
    assert store.resolve("task@v1") == first
    assert store.resolve(first.ref) == first
    assert store.resolve(f"task@{first.digest}") == first
    assert store.resolve(f"task@{first.digest[:19]}") == first
    assert store.task("task").versions == (first, second)
    for ref in ("task@", "task@v3", "task@latest", "task@canary", "task@v1@v2"):
        with pytest.raises(UnknownVersion):
            store.resolve(ref)
    with pytest.raises(UnknownTask):
        store.resolve("other@v1")
    with pytest.raises(InvalidTaskName):
        store.resolve("@v1")


def test_putting_the_live_bytes_again_changes_nothing(open_store: OpenStore) -> None:
    store = open_store()
    first = store.put("task", make_artifact())
    again = store.put("task", make_artifact())
    assert not again.created
    assert again.version == first.version
    assert len(store.task("task").versions) == 1


def test_an_upload_arrives_in_pieces_and_checks_the_announced_digest(open_store: OpenStore) -> None:
    store = open_store()
    data = make_artifact()
    for announced in (digest_of(data), digest_of(data)[7:], digest_of(data)[7:].upper()):
        with store.begin_upload() as upload:
            for start in range(0, len(data), 100):
                upload.write(data[start : start + 100])
            upload.commit("task", expected_sha256=announced)
    with store.begin_upload() as upload:
        upload.write(data)
        with pytest.raises(DigestMismatch, match=digest_of(data)):
            upload.commit("task2", expected_sha256="0" * 64)
    assert [info.name for info in store.tasks()] == ["task"]


def test_an_upload_that_is_left_or_aborted_leaves_nothing(open_store: OpenStore) -> None:
    store = open_store()
    with store.begin_upload() as upload:
        upload.write(make_artifact())
    aborted = store.begin_upload()
    aborted.write(make_artifact())
    aborted.abort()
    assert store.tasks() == []
    assert store.stats().disk_entries == 0


def test_an_upload_longer_than_any_valid_artifact_is_cut_off(open_store: OpenStore) -> None:
    store = open_store()
    upload = store.begin_upload()
    upload.write(bytes(store.max_artifact_bytes))
    with pytest.raises(ArtifactTooLarge, match=str(store.max_artifact_bytes)):
        upload.write(b"x")


@pytest.mark.parametrize("valid_header", [False, True])
def test_a_refused_upload_changes_nothing(open_store: OpenStore, valid_header: bool) -> None:
    store = open_store()
    store.put("task", make_artifact())
    keys, values = random_kv(TINY_BASE, 3, seed=1)
    keys[0][0, 0, 0] = float("nan")
    poisoned = encode(manifest_for(TINY_BASE, 3), keys, values)
    expected = (store.tasks(), store.stats())
    with pytest.raises((MalformedArtifact, IncompatiblePrefix)):
        store.put("task", poisoned if valid_header else b"not an artifact")
    assert (store.tasks(), store.stats()) == expected


def test_conditional_writes_see_the_live_digest(open_store: OpenStore) -> None:
    store = open_store()
    first, second = make_artifact(seed=1), make_artifact(seed=2)

    def put(data: bytes, *, if_match: str | None = None, if_none_match: bool = False) -> None:
        with store.begin_upload() as upload:
            upload.write(data)
            upload.commit("task", if_match=if_match, if_none_match=if_none_match)

    with pytest.raises(PreconditionFailed, match="no live version"):
        put(first, if_match="*")
    put(first, if_none_match=True)
    with pytest.raises(PreconditionFailed, match="exists already"):
        put(second, if_none_match=True)
    with pytest.raises(PreconditionFailed, match=digest_of(first)):
        put(second, if_match=digest_of(second))
    assert store.stats().disk_entries == 1
    put(second, if_match=digest_of(first))
    with pytest.raises(PreconditionFailed):
        store.delete("task", if_match=digest_of(first))
    store.delete("task", if_match=digest_of(second))


def test_versions_count_on_after_a_delete_and_old_ones_stay_hidden(open_store: OpenStore) -> None:
    store = open_store()
    for seed in (1, 2):
        store.put("task", make_artifact(seed=seed))
    store.delete("task")
    for ref in ("task", "task@v1"):
        with pytest.raises(UnknownTask):
            store.resolve(ref)
    with pytest.raises(UnknownTask):
        store.delete("task")
    assert store.put("task", make_artifact(seed=2)).version.version == 3
    with pytest.raises(UnknownVersion):
        store.resolve("task@v2")
    assert open_store().resolve("task").version == 3


def test_deleted_bytes_stay_while_they_are_held_and_go_with_the_last_hold(
    open_store: OpenStore,
) -> None:
    store = open_store()
    version = store.put("task", make_artifact()).version
    before = open_store().stats()
    assert before.disk_entries == 1
    store = open_store()
    store.load(version.digest)
    store.hold(version)
    store.hold(version)

    assert store.delete("task") == [version.digest]
    assert not store.free(version.digest)
    assert store.load(version.digest).prefix.digest == version.digest
    with pytest.raises(UnknownTask, match="was deleted"):
        store.hold(version)
    assert not store.release(version.digest)
    assert store.release(version.digest)
    assert store.free(version.digest)

    assert (store.stats().disk_entries, store.stats().disk_bytes) == (0, 0)
    assert (store.stats().host_entries, store.stats().host_bytes) == (0, 0)
    with pytest.raises(PrefixUnavailable):
        store.load(version.digest)


def test_bytes_that_another_version_names_are_never_freed(open_store: OpenStore) -> None:
    store = open_store()
    digest = store.put("task", make_artifact()).version.digest
    store.put("other", make_artifact())
    assert store.delete("task") == []
    assert not store.free(digest)
    store.delete("other")
    store.put("task", make_artifact())
    assert not store.free(digest)
    assert store.load(digest).prefix.digest == digest


def test_a_damaged_log_keeps_every_blob_in_its_place(tmp_path: Path) -> None:
    store = PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0)
    for task in ("task", "other"):
        store.put(task, make_artifact())
    store.close()
    log = next(path for path in (tmp_path / "log").iterdir() if path.name == log_name("other"))
    next(log.iterdir()).write_bytes(b"damaged")
    store = PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0)
    (digest,) = store.delete("task")
    assert not store.free(digest)
    assert store.stats().disk_entries == 1
    store.close()


def test_an_upload_that_fails_at_the_last_step_leaves_no_blob(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    kept = store.put("other", make_artifact(seed=1)).version

    def full(*_: object, **__: object) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(Catalog, "_append", full)
    for seed in (1, 2):
        with pytest.raises(StoreFull):
            store.put("task", make_artifact(seed=seed))
    assert store.stats().disk_entries == 1
    assert store.load(kept.digest).prefix.digest == kept.digest


def test_uploads_of_bytes_that_are_being_deleted_end_whole_or_not_at_all(
    open_store: OpenStore,
) -> None:
    """The race of reclaiming against deduplication: a version must never name a blob that went."""
    store = open_store(host_cache_bytes=0)
    data = make_artifact()
    digest = digest_of(data)
    failures: list[Exception] = []

    def work(task: str) -> None:
        try:
            for _ in range(15):
                version = store.put(task, data).version
                store.hold(version)
                assert store.load(digest).prefix.digest == digest
                store.delete(task)
                assert store.load(digest).prefix.digest == digest
                if store.release(digest):
                    store.free(digest)
        except Exception as error:  # noqa: BLE001 - a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"task-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.free(digest)
    assert failures == []
    assert store.stats().disk_entries == 0


def test_aliases_move_only_to_what_can_be_read(open_store: OpenStore) -> None:
    store = open_store(host_cache_bytes=0)
    first, second = (store.put("task", make_artifact(seed=seed)).version for seed in (1, 2))
    with pytest.raises(PreconditionFailed):
        store.promote("task", 1, if_match=first.digest)
    assert store.promote("task", 1, if_match=second.digest)
    assert not store.promote("task", 1)
    assert store.resolve("task") == first
    assert store.rollback("task") == second
    assert store.set_canary("task", 1, 0.25)
    assert store.resolve("task@canary") == first
    assert open_store().task("task").canary == Canary(first, 0.25)
    store = open_store(host_cache_bytes=0)
    store._backend.remove_blob(first.digest)
    for move in (
        lambda: store.promote("task", 1),
        lambda: store.set_canary("task", 1, 0.5),
        lambda: store.rollback("task"),
    ):
        with pytest.raises(PrefixUnavailable):
            move()
    store.end_canary("task")
    assert store.resolve("task") == second


def test_only_what_was_live_before_can_be_rolled_back_to(open_store: OpenStore) -> None:
    store = open_store()
    store.put("task", make_artifact())
    with pytest.raises(NoSuchMove, match="no version that was live before"):
        store.rollback("task")


def test_stored_bytes_are_read_in_pieces_also_while_they_are_removed(open_store: OpenStore) -> None:
    store = open_store()
    data = make_artifact()
    version = store.put("task", data).version
    content = store.open_content(version)
    assert content.num_bytes == len(data)
    store.delete("task")
    assert store.free(version.digest)
    assert content.read(10, 20) + content.read(30, 10**6) == data[10:]
    assert content.read(len(data), 5) == b""
    content.close()
    content.close()
    with pytest.raises(PrefixUnavailable):
        store.open_content(version)


def test_a_store_opened_for_another_base_refuses_to_load_what_does_not_fit(
    open_store: OpenStore,
) -> None:
    digest = open_store().put("task", make_artifact()).version.digest
    store = open_store(base_with(fingerprint="sha256:" + "b" * 64))
    assert store.resolve("task").digest == digest
    with pytest.raises(PrefixUnavailable, match="does not fit the resident model: trained on"):
        store.load(digest)
    assert open_store().load(digest).prefix.digest == digest


def test_the_host_cache_keeps_to_its_budget_and_counts(open_store: OpenStore) -> None:
    one = TINY_BASE.layout.bytes_per_token * 3
    store = open_store(host_cache_bytes=2 * one)
    digests = [store.put("task", make_artifact(seed=seed)).version.digest for seed in range(3)]
    for digest in digests:
        store.load(digest)
    store.load(digests[2])
    assert [store.is_on_host(digest) for digest in digests] == [False, True, True]
    stats = store.stats()
    assert (stats.host_bytes, stats.host_capacity_bytes, stats.host_entries) == (
        2 * one,
        2 * one,
        2,
    )
    assert (stats.host_hits, stats.host_misses, stats.host_evictions) == (1, 3, 1)
    assert stats.disk_entries == 3
    assert stats.disk_bytes == sum(version.size_bytes for version in store.task("task").versions)


def test_similar_names_are_suggested(open_store: OpenStore) -> None:
    store = open_store()
    for name in ("summarise", "summarise-de", "translate"):
        store.put(name, make_artifact())
    assert store.similar("sumarise", limit=1) == ["summarise"]
    assert store.similar("sumarise") == ["summarise", "summarise-de"]
    assert store.similar("x" * 10_000) == []
    assert store.similar("") == []


def test_uploads_loads_and_listings_run_side_by_side(open_store: OpenStore) -> None:
    store = open_store(host_cache_bytes=1000)
    store.put("shared", make_artifact(seed=99))
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            for seed in range(4):
                version = store.put(f"task-{number}", make_artifact(seed=seed % 2)).version
                assert store.resolve(version.ref) == version
                assert store.load(version.digest).prefix.digest == version.digest
                store.put("shared", make_artifact(seed=10 * number + seed))
                store.tasks()
                store.stats()
        except Exception as error:  # noqa: BLE001 - a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [v.version for v in store.task("shared").versions] == list(range(1, 18))
    assert open_store().tasks() == store.tasks()


def test_open_locks_the_directory_until_closed(tmp_path: Path) -> None:
    store = PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0, max_num_virtual_tokens=8)
    with pytest.raises(StoreLocked):
        PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0)
    with pytest.raises(IncompatiblePrefix, match="allows 8"):
        store.put("task", make_artifact(num_virtual_tokens=9))
    store.close()
    store.close()
    PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0).close()


def test_a_failed_opening_gives_the_directory_up_again(tmp_path: Path) -> None:
    PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0).close()
    (tmp_path / "log" / ("a" * 32)).write_text("a file where a directory should be")
    with pytest.raises(StoreFailed):
        PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0)
    (tmp_path / "log" / ("a" * 32)).unlink()
    PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0).close()


def test_bytes_that_the_disk_changed_under_an_upload_are_not_published(tmp_path: Path) -> None:
    store = PrefixStore.open(tmp_path, TINY_BASE, host_cache_bytes=0)
    data = make_artifact()
    with store.begin_upload() as upload:
        upload.write(data)
        (staged,) = (tmp_path / "tmp").iterdir()
        staged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(StoreFailed, match="other bytes"):
            upload.commit("task")
    assert store.tasks() == []
    assert store.stats().disk_entries == 0
    store.close()


def test_an_abort_during_a_commit_waits_for_it(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that goes away makes its handler abort while the worker thread still commits."""
    store = open_store()
    upload = store.begin_upload()
    upload.write(make_artifact())
    proving, go_on = threading.Event(), threading.Event()
    real = Upload.judge

    def slow_proof(self: Upload, *, expected_sha256: str | None = None) -> Prefix:
        proving.set()
        assert go_on.wait(10)
        return real(self, expected_sha256=expected_sha256)

    monkeypatch.setattr(Upload, "judge", slow_proof)
    committing = threading.Thread(target=upload.commit, args=("task",))
    committing.start()
    assert proving.wait(10)
    aborting = threading.Thread(target=upload.abort)
    aborting.start()
    aborting.join(0.05)
    assert aborting.is_alive()
    go_on.set()
    committing.join()
    aborting.join()
    assert store.resolve("task").version == 1
