"""The contract of `backends.base`, over every backend."""

from __future__ import annotations

import threading

import pytest

from prefix_store.backends.base import Backend, DiskUsage
from prefix_store.errors import PrefixUnavailable, StoreFailed
from prefix_store.spec import digest_of
from tests.prefix_store.conftest import OpenBackend

LOG = "0123456789abcdef" * 2
OTHER_LOG = "f" * 32


def publish(backend: Backend, data: bytes) -> str:
    staged = backend.stage()
    staged.write(data)
    staged.publish()
    staged.discard()
    return staged.digest


def test_a_published_blob_is_read_back_also_after_reopening(open_backend: OpenBackend) -> None:
    digest = publish(open_backend(), b"abc")
    assert digest == digest_of(b"abc")
    backend = open_backend()
    assert backend.read_blob(digest) == b"abc"
    assert backend.usage() == DiskUsage(3, 1)


def test_a_staging_counts_hashes_and_reads_back_what_was_written(open_backend: OpenBackend) -> None:
    staged = open_backend().stage()
    for chunk in (b"", b"hello ", b"world"):
        staged.write(chunk)
    assert staged.num_bytes == 11
    assert staged.digest == digest_of(b"hello world")
    assert staged.read() == b"hello world"
    assert staged.read(5) == b"hello"
    assert staged.read(99) == b"hello world"
    staged.discard()


def test_a_discarded_staging_leaves_nothing(open_backend: OpenBackend) -> None:
    backend = open_backend()
    staged = backend.stage()
    staged.write(b"abc")
    digest = staged.digest
    staged.discard()
    staged.discard()
    assert backend.usage() == DiskUsage(0, 0)
    with pytest.raises(PrefixUnavailable):
        backend.read_blob(digest)


def test_a_blob_read_is_memory_of_the_readers_own(open_backend: OpenBackend) -> None:
    backend = open_backend()
    digest = publish(backend, b"abc")
    backend.read_blob(digest)[0] = 0
    assert backend.read_blob(digest) == b"abc"


def test_publishing_the_same_bytes_twice_keeps_one_blob(open_backend: OpenBackend) -> None:
    backend = open_backend()
    assert publish(backend, b"abc") == publish(backend, b"abc")
    assert backend.usage() == DiskUsage(3, 1)


def test_many_threads_may_publish_the_same_and_different_blobs(open_backend: OpenBackend) -> None:
    backend = open_backend()
    blobs = [bytes([index % 3]) * 10 for index in range(12)]
    threads = [threading.Thread(target=publish, args=(backend, blob)) for blob in blobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.usage() == DiskUsage(30, 3)
    assert all(backend.read_blob(digest_of(blob)) == blob for blob in blobs)


@pytest.mark.parametrize(
    "digest", ["sha256:" + "0" * 64, "sha256:../../etc/passwd", "", "sha256:" + "A" * 64]
)
def test_an_unknown_digest_is_unavailable(open_backend: OpenBackend, digest: str) -> None:
    with pytest.raises(PrefixUnavailable):
        open_backend().read_blob(digest)


def test_a_sweep_removes_exactly_what_is_not_kept(open_backend: OpenBackend) -> None:
    backend = open_backend()
    kept, swept = publish(backend, b"kept"), publish(backend, b"swept")
    backend.sweep_blobs({kept, "sha256:" + "0" * 64})
    assert backend.read_blob(kept) == b"kept"
    assert backend.usage() == DiskUsage(4, 1)
    with pytest.raises(PrefixUnavailable):
        backend.read_blob(swept)


def test_records_are_read_back_by_log_and_index_also_after_reopening(
    open_backend: OpenBackend,
) -> None:
    backend = open_backend()
    assert backend.read_logs() == {}
    backend.append_record(LOG, 1, b"one")
    backend.append_record(OTHER_LOG, 1, b"uno")
    backend.append_record(LOG, 2, b"two")
    expected = {LOG: {1: b"one", 2: b"two"}, OTHER_LOG: {1: b"uno"}}
    assert backend.read_logs() == expected
    assert open_backend().read_logs() == expected


def test_a_record_is_never_overwritten(open_backend: OpenBackend) -> None:
    backend = open_backend()
    backend.append_record(LOG, 1, b"one")
    with pytest.raises(StoreFailed, match="did not write"):
        backend.append_record(LOG, 1, b"another")
    assert backend.read_logs() == {LOG: {1: b"one"}}


def test_a_removed_blob_is_gone_but_not_for_who_has_it_open(open_backend: OpenBackend) -> None:
    backend = open_backend()
    digest = publish(backend, b"abcdef")
    reader = backend.open_blob(digest)
    backend.remove_blob(digest)
    backend.remove_blob(digest)
    assert backend.usage() == DiskUsage(0, 0)
    assert (reader.num_bytes, reader.read(1, 3), reader.read(4, 99)) == (6, b"bcd", b"ef")
    reader.close()
    reader.close()
    for call in (backend.read_blob, backend.open_blob):
        with pytest.raises(PrefixUnavailable):
            call(digest)
    assert publish(backend, b"abcdef") == digest
    assert backend.read_blob(digest) == b"abcdef"
