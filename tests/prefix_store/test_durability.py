"""What was acknowledged stays: quick kills of the backend alone, and damage on disk.

The real server is killed in `tests/e2e/kill_loop.py`; power losses are in `test_crash_points.py`.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
from typing import IO

import pytest

from prefix_store.backends.filesystem import FilesystemBackend
from prefix_store.catalog import Catalog
from prefix_store.errors import PrefixUnavailable
from prefix_store.records import log_name
from prefix_store.spec import digest_of
from prefix_store.store import PrefixStore
from tests.prefix_store.builders import TINY_BASE, make_artifact

KILL_CYCLES = 25


def open_store(root: Path) -> PrefixStore:
    return PrefixStore.open(root, TINY_BASE, host_cache_bytes=0)


def blob_path(root: Path, digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return root / "blobs" / name[:2] / name


def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    rng = random.Random(7)
    command = [sys.executable, "-m", "tests.prefix_store.killed_writer", str(tmp_path)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, bufsize=1) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for _ in range(KILL_CYCLES):
            writer.stdin.write("go\n")
            acknowledged += one_cycle(writer.stdout, rng)
            check_all_there(tmp_path, acknowledged)
        writer.stdin.close()
    assert len(acknowledged) >= KILL_CYCLES


def one_cycle(lines: IO[str], rng: random.Random) -> list[str]:
    """What one writer acknowledged until it was killed, somewhere inside of a later commit."""
    acknowledged: list[str] = []
    pid, wanted = 0, rng.randrange(1, 5)
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        match word:
            case "started":
                pid = int(rest)
            case "acknowledged":
                acknowledged.append(rest)
            case "ended":
                return acknowledged
        if pid and len(acknowledged) == wanted:
            time.sleep(rng.random() * 0.01)
            os.kill(pid, signal.SIGKILL)
    raise AssertionError("the writer stopped by itself")


def check_all_there(root: Path, acknowledged: list[str]) -> None:
    backend = FilesystemBackend(root)
    catalog = Catalog(backend)
    found = {version.version: version.digest for version in catalog.task("task").versions}
    for line in acknowledged:
        number, digest = line.split()
        assert found[int(number)] == digest
        assert digest_of(backend.read_blob(digest)) == digest
    assert sorted(found) == list(range(1, len(found) + 1))
    assert list((root / "tmp").iterdir()) == []
    backend.close()


DAMAGES = 5_000  # of blobs, and as many of records


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One bit flipped, or the end lost, or a byte more."""
    chance = rng.random()
    if chance < 0.7:
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    return data[: rng.randrange(len(data))] if chance < 0.95 else data + b"x"


def test_any_damage_to_a_stored_blob_is_noticed_before_its_use(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    data = make_artifact()
    digest = store.put("task", data).version.digest
    path = blob_path(tmp_path, digest)
    rng = random.Random(3)
    for _ in range(DAMAGES):
        path.write_bytes(damaged(data, rng))
        with pytest.raises(PrefixUnavailable, match="damaged"):
            store.load(digest)
    path.unlink()
    with pytest.raises(PrefixUnavailable) as caught:
        store.load(digest)
    assert str(tmp_path) not in str(caught.value)
    store.put("task", data)
    assert store.load(digest).prefix.digest == digest
    store.close()


@pytest.fixture
def eventful(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """A store where `task` has a record of every kind that its live version can stand on, and `other` one."""
    caplog.set_level(logging.CRITICAL, "prefix_store.catalog")
    store = open_store(tmp_path)
    store.put("other", make_artifact(seed=1))
    store.put("task", make_artifact(seed=9))
    store.delete("task")
    for seed in range(3):
        store.put("task", make_artifact(seed=seed), activate=seed == 0)
    store.promote("task", 3)
    store.promote("task", 4)
    store.rollback("task")
    store.set_canary("task", 2, 0.25)
    store.end_canary("task")
    store.set_canary("task", 2, 0.5)
    store.close()
    return tmp_path


def assert_only_task_is_broken(backend: FilesystemBackend) -> None:
    catalog = Catalog(backend)
    assert catalog.num_broken() == 1
    with pytest.raises(PrefixUnavailable):
        catalog.live("task")
    assert catalog.live("other").version == 1


def test_any_damage_to_a_version_record_is_noticed_before_its_use(eventful: Path) -> None:
    backend = FilesystemBackend(eventful)
    paths = sorted((eventful / "log" / log_name("task")).iterdir())
    assert len(paths) == 11
    intact = [path.read_bytes() for path in paths]
    rng = random.Random(4)
    for _ in range(DAMAGES):
        at = rng.randrange(len(paths))
        paths[at].write_bytes(damaged(intact[at], rng))
        assert_only_task_is_broken(backend)
        paths[at].write_bytes(intact[at])
    assert Catalog(backend).live("task").version == 3
    backend.close()


def test_each_bit_of_the_last_record_is_guarded(eventful: Path) -> None:
    """No later record names its hash: a flip there could move `live`, or change a canary's weight."""
    backend = FilesystemBackend(eventful)
    path = max((eventful / "log" / log_name("task")).iterdir())
    intact = path.read_bytes()
    for bit in range(8 * len(intact)):
        changed = bytearray(intact)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert_only_task_is_broken(backend)
    for length in range(len(intact)):
        path.write_bytes(intact[:length])
        assert_only_task_is_broken(backend)
    backend.close()


def test_a_damaged_log_keeps_every_blob_for_its_repair(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name in ("broken", "gone"):
        store.put(name, make_artifact(seed=len(name)))
    store.delete("gone")
    store.close()
    (log,) = (path for path in (tmp_path / "log").iterdir() if len(list(path.iterdir())) == 1)
    (record,) = log.iterdir()
    intact = record.read_bytes()

    record.write_bytes(intact[:-1])
    store = open_store(tmp_path)
    with pytest.raises(PrefixUnavailable):
        store.resolve("broken")
    assert store.stats().disk_entries == 2
    store.close()

    record.write_bytes(intact)
    store = open_store(tmp_path)
    assert store.load(store.resolve("broken").digest)
    assert store.stats().disk_entries == 1
    store.close()
