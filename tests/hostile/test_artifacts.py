"""Hostile uploads: each is refused for what it is, and the store is as it was before."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefix_store.artifact import decode
from prefix_store.errors import IncompatiblePrefix, MalformedArtifact
from prefix_store.header import read_header
from prefix_store.store import PrefixStore
from tests.hostile.disguised import DISGUISED, SENTINEL, VALID
from tests.hostile.foreign import FOREIGN
from tests.hostile.incompatible import INCOMPATIBLE
from tests.hostile.judge import faults_of_refusal
from tests.hostile.malformed import MALFORMED
from tests.hostile.twin import read_by_library
from tests.prefix_store.builders import TINY_BASE


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[PrefixStore]:
    store = PrefixStore.open(root, TINY_BASE, host_cache_bytes=0, max_num_virtual_tokens=32)
    store.put("task", VALID)
    yield store
    store.close()


def snapshot(store: PrefixStore, root: Path) -> object:
    """All that an upload could have changed."""
    files = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file())
    return files, store.tasks(), store.stats()


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_and_leaves_no_trace(
    store: PrefixStore, root: Path, name: str
) -> None:
    before = snapshot(store, root)
    with pytest.raises(MalformedArtifact) as caught:
        store.put("task", MALFORMED[name])
    assert snapshot(store, root) == before
    assert faults_of_refusal(caught.value) == []


@pytest.mark.parametrize("name", INCOMPATIBLE)
def test_a_prefix_for_another_model_is_refused_and_leaves_no_trace(
    store: PrefixStore, root: Path, name: str
) -> None:
    before = snapshot(store, root)
    with pytest.raises(IncompatiblePrefix) as caught:
        store.put("task", INCOMPATIBLE[name])
    assert snapshot(store, root) == before
    assert faults_of_refusal(caught.value) == []


def test_no_pickle_was_ever_run() -> None:
    for data in DISGUISED.values():
        with pytest.raises(MalformedArtifact):
            read_header(data, len(data))
    assert not SENTINEL.exists()


def test_the_pickles_would_run_if_anybody_unpickled_them() -> None:
    try:
        pickle.loads(DISGUISED["pickle of protocol 4 that runs a command"])
        assert SENTINEL.exists()
    finally:
        SENTINEL.unlink(missing_ok=True)


def test_there_are_enough_cases_no_two_alike_and_the_valid_file_is_valid() -> None:
    files = [*MALFORMED.values(), *INCOMPATIBLE.values(), *FOREIGN.values()]
    assert len(files) >= 350
    assert len(set(files)) == len(files)
    decode(VALID, "sha256:any")


def test_no_named_file_is_accepted_that_the_safetensors_library_refuses() -> None:
    """Those that it takes and we do not are why there is a reader of our own."""
    for data in INCOMPATIBLE.values():
        assert read_by_library(data) is not None
    taken_by_them = [name for name, data in MALFORMED.items() if read_by_library(data) is not None]
    assert {"duplicate tensor", "empty object and no data", "tensors out of order"} <= {
        *taken_by_them
    }
    assert len(taken_by_them) > 100
