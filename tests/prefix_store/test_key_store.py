"""Keys on disk: what one process did, another finds; what was changed by hand opens nothing."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prefix_store import key_store
from prefix_store.errors import KeyNotIssued, KeysDamaged, StoreFull, UnknownKey
from prefix_store.key_store import KeyStore
from prefix_store.keys import KeyScope, KeyState, hash_of

INFER = frozenset({KeyScope.INFER})
BOTH = frozenset({KeyScope.INFER, KeyScope.ADMIN})


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "deep" / "keys")


def directory_of(keys: KeyStore) -> Path:
    return keys._directory


def reopened(keys: KeyStore) -> KeyStore:
    return KeyStore(directory_of(keys))


def state_of(keys: KeyStore, key_id: str, in_seconds: float = 0) -> KeyState:
    key = keys.find(key_id)
    assert key is not None
    return key.state(datetime.now(UTC) + timedelta(seconds=in_seconds))


def test_a_key_is_found_by_its_id_also_by_the_next_process(keys: KeyStore) -> None:
    new = keys.create("acme", BOTH, expires_in_seconds=60, note="CI")

    for found in (keys.find(new.key.id), reopened(keys).find(new.key.id)):
        assert found == new.key
        assert (found.tenant, found.scopes, found.note) == ("acme", BOTH, "CI")
        assert found.sha256 == hash_of(new.text)
    assert state_of(keys, new.key.id, 59) is KeyState.ACTIVE
    assert state_of(keys, new.key.id, 61) is KeyState.EXPIRED


def test_no_file_holds_a_key_and_only_the_owner_reads_them(keys: KeyStore) -> None:
    texts = [keys.create("acme", INFER).text, keys.create("", INFER).text]
    keys.rotate(keys.listed()[0].id, overlap_seconds=1)

    paths = sorted(directory_of(keys).iterdir())
    assert len(paths) == 4  # three records and the lock
    assert stat.S_IMODE(directory_of(keys).stat().st_mode) == 0o700
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not any(text.rpartition("_")[2] in path.read_text() for text in texts)


def test_a_rotated_key_works_beside_its_successor_for_the_overlap(keys: KeyStore) -> None:
    old = keys.create("acme", BOTH, expires_in_seconds=10_000, note="CI").key
    new = keys.rotate(old.id, overlap_seconds=100).key

    assert (new.tenant, new.scopes, new.note) == (old.tenant, old.scopes, old.note)
    assert new.expires_at is not None
    assert old.expires_at is not None
    assert new.expires_at - new.created_at == old.expires_at - old.created_at
    for found in (keys, reopened(keys)):
        assert state_of(found, old.id, 99) is KeyState.ACTIVE
        assert state_of(found, old.id, 101) is KeyState.EXPIRED
        assert state_of(found, new.id, 9_990) is KeyState.ACTIVE
        assert found.find(old.id).replaced_by == new.id  # type: ignore[union-attr] # a key that is not there fails the test too


def test_an_overlap_makes_no_key_live_longer(keys: KeyStore) -> None:
    old = keys.create("acme", INFER, expires_in_seconds=5).key
    keys.rotate(old.id, overlap_seconds=1000)

    assert state_of(keys, old.id, 6) is KeyState.EXPIRED


def test_without_an_overlap_the_old_key_ends_at_once(keys: KeyStore) -> None:
    old = keys.create("acme", INFER).key
    keys.rotate(old.id, overlap_seconds=0)

    assert state_of(keys, old.id) is KeyState.EXPIRED


def test_only_an_active_key_without_a_successor_is_rotated(keys: KeyStore) -> None:
    rotated, revoked = keys.create("acme", INFER).key, keys.create("acme", INFER).key
    keys.rotate(rotated.id, overlap_seconds=10)
    keys.revoke(revoked.id)

    with pytest.raises(KeyNotIssued, match="already"):
        keys.rotate(rotated.id, overlap_seconds=10)
    with pytest.raises(KeyNotIssued, match="revoked"):
        keys.rotate(revoked.id, overlap_seconds=10)
    with pytest.raises(UnknownKey):
        keys.rotate("00000000", overlap_seconds=10)


def test_a_revoked_key_stays_so(keys: KeyStore) -> None:
    key = keys.create("acme", INFER).key
    first = keys.revoke(key.id)

    assert state_of(keys, key.id) is state_of(reopened(keys), key.id) is KeyState.REVOKED
    assert keys.revoke(key.id) == first
    with pytest.raises(UnknownKey):
        keys.revoke("00000000")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_time_that_is_none_makes_no_key(keys: KeyStore, seconds: float) -> None:
    with pytest.raises(KeyNotIssued):
        keys.create("acme", INFER, expires_in_seconds=seconds)
    assert not keys.any_made


def test_another_process_keys_are_found_within_half_a_second(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = reopened(keys)
    new = other.create("acme", INFER).key
    keys.refresh()
    assert keys.find(new.id) is None, "it looks at most twice a second"

    now = keys._looked_at + key_store.REFRESH_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: now)
    keys.refresh()
    assert keys.find(new.id) == new
    assert keys.any_made


def test_a_writer_first_learns_what_others_wrote(keys: KeyStore) -> None:
    """Without the wait of `refresh`: a chain has one end."""
    other = reopened(keys)
    made = [store.create("acme", INFER).key.id for store in (keys, other) * 3]

    assert [key.id for key in reopened(keys).listed()] == made
    other.revoke(made[4])
    assert keys.revoke(made[4]).revoked_at == other.find(made[4]).revoked_at  # type: ignore[union-attr] # likewise


def test_processes_and_threads_that_write_at_once_lose_nothing(keys: KeyStore) -> None:
    code = (
        "import sys; from pathlib import Path; from prefix_store.key_store import KeyStore; "
        "from prefix_store.keys import KeyScope; keys = KeyStore(Path(sys.argv[1])); "
        "[keys.create('beta', frozenset({KeyScope.INFER})) for _ in range(10)]"
    )
    command = [sys.executable, "-c", code, str(directory_of(keys))]
    others = [subprocess.Popen(command) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda: [keys.create("acme", INFER) for _ in range(10)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait() for other in others] == [0, 0]

    found = reopened(keys)
    assert [len(found.listed(tenant)) for tenant in ("acme", "beta")] == [20, 20]
    assert len(list(directory_of(keys).glob("*.json"))) == 40


@pytest.mark.parametrize("index", [1, 2, 3])
def test_a_changed_record_keeps_the_server_from_starting(keys: KeyStore, index: int) -> None:
    key = keys.create("acme", INFER).key
    keys.create("beta", INFER)
    keys.revoke(key.id)
    path = directory_of(keys) / f"{index:020d}.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(KeysDamaged):
            reopened(keys)


@pytest.mark.parametrize("index", [1, 2])
def test_so_does_a_lost_one_unless_it_was_the_last(keys: KeyStore, index: int) -> None:
    for _ in range(3):
        keys.create("acme", INFER)
    (directory_of(keys) / f"{index:020d}.json").unlink()

    with pytest.raises(KeysDamaged, match=str(index)):
        reopened(keys)


def test_inference_does_not_become_open_by_a_first_record_that_can_not_be_read(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory_of(keys) / f"{1:020d}.json").write_bytes(b"{}")
    monkeypatch.setattr(key_store, "REFRESH_SECONDS", 0)
    keys.refresh()

    assert keys.any_made


def test_a_record_that_can_not_be_trusted_makes_every_key_useless(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been a revocation."""
    key = keys.create("acme", INFER).key
    (directory_of(keys) / f"{2:020d}.json").write_bytes(b"{}")
    monkeypatch.setattr(key_store, "REFRESH_SECONDS", 0)
    keys.refresh()

    assert keys.find(key.id) is None
    assert keys.any_made, "inference does not become open by it"
    with pytest.raises(KeysDamaged):
        keys.create("acme", INFER)


def test_a_file_system_that_fails_leaves_the_keys_as_they_were(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keys.create("acme", INFER).key

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "gone")

    with monkeypatch.context() as patched:
        patched.setattr(key_store, "REFRESH_SECONDS", 0)
        patched.setattr(os, "stat", fails)
        keys.refresh()
    assert keys.find(key.id) == key


def test_a_key_for_which_there_is_no_room_was_not_made(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(StoreFull):
            keys.create("acme", INFER)
    assert keys.listed() == reopened(keys).listed() == []
    assert keys.create("acme", INFER).key in reopened(keys).listed()


@pytest.mark.parametrize("seed", range(3))
def test_any_history_is_read_back_as_it_was(keys: KeyStore, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        active = [k.id for k in keys.listed() if state_of(keys, k.id) is KeyState.ACTIVE]
        fresh = [key_id for key_id in active if keys.find(key_id).replaced_by is None]  # type: ignore[union-attr] # ids of keys that there are
        if not fresh or rng.random() < 0.4:
            keys.create(rng.choice(["acme", "beta", ""]), rng.choice([INFER, BOTH]))
        elif rng.random() < 0.5:
            keys.rotate(rng.choice(fresh), overlap_seconds=rng.choice([0, 100]))
        else:
            keys.revoke(rng.choice(active))

    assert reopened(keys).listed() == keys.listed()
