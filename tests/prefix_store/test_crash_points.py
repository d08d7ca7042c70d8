"""What a crash leaves at any moment of any scenario, on a file system that forgets what was not synced."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefix_store.errors import PrefixStoreError
from tests.prefix_store.crash import SCENARIOS, explore
from tests.prefix_store.crash_points import CrashFault, installed
from tests.prefix_store.crash_scenarios import a_long_history, open_store
from tests.prefix_store.planted_crash_bugs import SYNCS, WRONG_ORDERS, watch_syncs
from tests.prefix_store.simulated_files import Disk, Effect, SimulatedOs

Plant = Callable[[pytest.MonkeyPatch], None]
SHORT = [name for name in SCENARIOS if name != a_long_history.__name__]  # make crash does it too


@pytest.mark.parametrize("scenario", SHORT)
def test_whatever_a_crash_leaves_is_as_before_the_change_or_as_after_it(scenario: str) -> None:
    explorer = explore(scenario)

    assert explorer.num_states > explorer.num_points > 3


def test_every_sync_of_the_store_has_a_name_to_be_left_out_by() -> None:
    seen: set[str] = set()

    def is_done(name: str) -> bool:
        seen.add(name)
        return True

    with pytest.MonkeyPatch.context() as patch:
        watch_syncs(patch, is_done)
        for scenario in (
            "first_upload",
            "audit_records_of_several_processes",
            "keys_of_several_processes",
        ):
            explore(scenario, recovery_crashes=0)

    assert seen == set(SYNCS)


@pytest.mark.parametrize(("sync", "scenario"), SYNCS.items())
def test_a_sync_that_is_left_out_is_noticed(sync: str, scenario: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        watch_syncs(patch, lambda name: name != sync)
        with pytest.raises((CrashFault, PrefixStoreError)):
            explore(scenario)


@pytest.mark.parametrize(("plant", "scenario"), WRONG_ORDERS)
def test_steps_in_the_wrong_order_are_noticed(plant: Plant, scenario: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises((CrashFault, PrefixStoreError)):
            explore(scenario)


# ---- the simulated files themselves --------------------------------------------------------------


def test_of_few_unsynced_effects_every_subset_may_survive() -> None:
    simulated = SimulatedOs(Disk())
    for name in ("a", "b", "c"):
        simulated.mkdir(f"/{name}")
    found = {tuple(name for name, _ in disk.tree()) for disk in simulated.disk().power_losses()}
    assert len(found) == 2**3

    simulated.fsync(simulated.open("/", os.O_RDONLY))
    assert [len(disk.tree()) for disk in simulated.disk().power_losses()] == [3]


def test_of_many_each_alone_and_all_but_each_may_survive() -> None:
    simulated = SimulatedOs(Disk())
    for number in range(9):
        simulated.mkdir(f"/{number}")
    found = {len(disk.tree()) for disk in simulated.disk().power_losses()}
    assert found == {0, 1, 8, 9}


def test_a_name_is_durable_without_its_bytes_and_bytes_without_their_name() -> None:
    simulated = SimulatedOs(Disk())
    fd = simulated.open("/file", os.O_RDWR | os.O_CREAT)
    simulated.write(fd, memoryview(b"bytes"))
    assert {disk.tree() for disk in simulated.disk().power_losses()} >= {
        (),
        (("file", b""),),
        (("file", b"bytes"),),
        (("file", b"b"),),
        (("file", b"by"),),
        (("file", b"\0\0\0\0\0"),),
        (("file", b"\0\0tes"),),
    }
    simulated.fsync(fd)
    assert {disk.tree() for disk in simulated.disk().power_losses()} == {(), (("file", b"bytes"),)}


def test_a_write_behind_a_lost_one_leaves_a_hole() -> None:
    disk = Disk(files={2: b""}).with_effects((Effect(2, "write", offset=2, data=b"cd"),))
    assert disk.files[2] == b"\0\0cd"


def real_tree(directory: Path) -> Iterator[tuple[str, bytes | None]]:
    for path in sorted(directory.rglob("*")):
        yield str(path.relative_to(directory)), path.read_bytes() if path.is_file() else None


def test_without_a_crash_the_simulated_files_are_like_real_ones(tmp_path: Path) -> None:
    """The same random calls to both: the same results, errors and files."""
    rng = random.Random(4)
    simulated = SimulatedOs(Disk())
    names = [f"{a}{b}" for a in ("", "x/", "y/", "x/z/") for b in ("x", "y", "z")]

    def both(call: str, *arguments: object) -> tuple[object, object]:
        outcomes = []
        for system, root in ((os, str(tmp_path)), (simulated, "")):
            given = [
                f"{root}/{argument}" if argument in names else argument for argument in arguments
            ]
            try:
                outcomes.append(getattr(system, call)(*given))
            except OSError as error:
                outcomes.append(error.errno)
        return outcomes[0], outcomes[1]

    for _ in range(2000):
        name, other = rng.choice(names), rng.choice(names)
        call = rng.choice(["mkdir", "listdir", "open", "link", "unlink"])
        if call == "open":
            flags = rng.choice([os.O_EXCL, 0, os.O_APPEND]) | os.O_RDWR | os.O_CREAT
            real, ours = both("open", name, flags)
            if not isinstance(ours, int) or ours < 1000:
                assert real == ours, (call, name)
                continue
            assert isinstance(real, int)
            for _ in range(rng.randrange(3)):
                data = memoryview(rng.randbytes(rng.randrange(1, 9)))
                assert os.write(real, data) == simulated.write(ours, data)
            assert os.pread(real, 5, 1) == simulated.pread(ours, 5, 1)
            assert os.fstat(real).st_size == simulated.fstat(ours).st_size
            os.close(real)
            simulated.close(ours)
        else:
            real, ours = both(call, name, *([other] if call == "link" else []))
            if call == "listdir" and isinstance(real, list) and isinstance(ours, list):
                real, ours = sorted(real), sorted(ours)
            assert real == ours, (call, name, other)
    assert len(list(real_tree(tmp_path))) > 3


def test_the_store_reaches_the_file_system_through_the_simulated_os_alone() -> None:
    """A path of the scenarios on the real disk would mean that something went round it."""
    with installed(SimulatedOs(Disk())):
        open_store()
    assert not Path("/srv/made").exists()
