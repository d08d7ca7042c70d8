"""Hostile uploads: each is refused for what it is, and the store is as it was before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors

from prefix_store.artifact import decode
from prefix_store.errors import IncompatiblePrefix, MalformedArtifact
from prefix_store.header import read_header, tensor_names
from prefix_store.store import PrefixStore
from tests.hostile.malformed import INCOMPATIBLE, MALFORMED, VALID
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
    assert_fit_to_show(caught.value)


@pytest.mark.parametrize("name", INCOMPATIBLE)
def test_a_prefix_for_another_model_is_refused_and_leaves_no_trace(
    store: PrefixStore, root: Path, name: str
) -> None:
    before = snapshot(store, root)
    with pytest.raises(IncompatiblePrefix) as caught:
        store.put("task", INCOMPATIBLE[name])
    assert snapshot(store, root) == before
    assert_fit_to_show(caught.value)


def assert_fit_to_show(error: MalformedArtifact | IncompatiblePrefix) -> None:
    """Short, printable, and telling nothing of the server."""
    assert error.problems
    assert len(str(error)) < 60_000
    for problem in error.problems:
        assert problem.detail
        assert len(problem.detail) < 400
        assert "/work" not in problem.detail
        assert "/tmp/" not in problem.detail


def test_no_pickle_was_ever_run() -> None:
    assert not Path("/tmp/prefixd-pwned").exists()


def test_there_are_enough_cases_and_the_valid_file_is_valid() -> None:
    assert len(MALFORMED) + len(INCOMPATIBLE) >= 200
    assert len(set(MALFORMED.values()) | set(INCOMPATIBLE.values())) == len(MALFORMED) + len(
        INCOMPATIBLE
    )
    decode(VALID, "sha256:any")


def they_read(data: bytes) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes as safetensors' own library reads them; None where it refuses."""
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: tuple(entry["shape"]) for name, entry in entries}


def we_read(data: bytes) -> dict[str, tuple[int, ...]] | None:
    try:
        header = read_header(data, len(data))
    except MalformedArtifact:
        return None
    shapes = [
        shape for pair in zip(header.key_shapes, header.value_shapes, strict=True) for shape in pair
    ]
    return dict(zip(tensor_names(len(header.key_shapes)), shapes, strict=True))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few small edits, most of them in the header, where they can matter."""
    changed = bytearray(data)
    header_end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(header_end if rng.random() < 0.95 else len(changed))
        match rng.choice(["flip", "byte", "digit", "delete", "insert", "copy"]):
            case "flip":
                changed[at] ^= 1 << rng.randrange(8)
            case "byte":
                changed[at] = rng.choice(b'{}[]",: 019.-eE\\untrfk\0\xff')
            case "digit":
                changed[at] = rng.choice(b"0123456789")
            case "delete":
                del changed[at : at + rng.choice([1, 1, 8])]
            case "insert":
                changed[at:at] = rng.choice([b" ", b"0", b'"', b"{", b"[1]", b"        "])
            case "copy":
                changed[at:at] = changed[at : at + rng.randrange(1, 40)]
        changed = changed or bytearray(b"\0")
        header_end = min(header_end, len(changed))
    if rng.random() < 0.5:  # half of them with a length that fits again
        text_end = len(changed) - (len(data) - 8 - int.from_bytes(data[:8], "little"))
        changed[:8] = max(text_end - 8, 0).to_bytes(8, "little")
    return bytes(changed)


def test_we_never_accept_what_the_safetensors_library_refuses() -> None:
    rng = random.Random(11)
    accepted = 0
    for data in [*MALFORMED.values(), *(mutated(VALID, rng) for _ in range(20_000))]:
        ours = we_read(data)
        if ours is not None:
            accepted += 1
            assert ours == they_read(data)
    assert accepted > 500  # else the mutations are too coarse to test anything


def test_nothing_but_a_named_error_ever_escapes() -> None:
    rng = random.Random(12)
    for _ in range(3000):
        data = mutated(VALID, rng)
        try:
            decode(data, "sha256:any")
        except MalformedArtifact as error:
            assert_fit_to_show(error)
