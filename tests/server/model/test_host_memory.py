"""What is free on the host, read from files as kernels and containers write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.model.host_memory import HostMemory, host_memory

MIB = 2**20
UNLIMITED_V1 = 9223372036854771712


def machine(root: Path, cgroup: str, *, available_mib: int = 6000) -> Path:
    proc = root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal:       {8000 * 1024} kB\nMemFree:  1 kB\nMemAvailable:   {available_mib * 1024} kB\n"
        "HugePages_Total:       0\n"
    )
    (proc / "self" / "cgroup").write_text(cgroup)
    return proc


def group(folder: Path, version: int, limit: object, used: int, droppable: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    v2 = version == 2
    (folder / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(f"{limit}\n")
    (folder / ("memory.current" if v2 else "memory.usage_in_bytes")).write_text(f"{used}\n")
    entry = "inactive_file" if v2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{entry} {droppable}\nactive_file 7\n")


def read(root: Path, proc: Path) -> HostMemory:
    return host_memory(proc, root / "cgroup")


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    proc = machine(tmp_path, "0::/\n")

    assert read(tmp_path, proc) == HostMemory(8000 * MIB, 6000 * MIB)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_its_limit_without_what_it_holds(tmp_path: Path, version: int) -> None:
    proc = machine(tmp_path, "0::/\n" if version == 2 else "9:cpu:/\n4:memory:/docker/abc\n")
    mount = tmp_path / "cgroup" if version == 2 else tmp_path / "cgroup" / "memory"
    group(mount, version, 1000 * MIB, 700 * MIB)

    assert read(tmp_path, proc) == HostMemory(1000 * MIB, 300 * MIB)


@pytest.mark.parametrize("version", [1, 2])
def test_pages_of_files_that_the_kernel_can_drop_are_free(tmp_path: Path, version: int) -> None:
    """A model that was just read fills them, and would leave nothing for its own KV pool."""
    proc = machine(tmp_path, "0::/\n" if version == 2 else "4:memory:/\n")
    mount = tmp_path / "cgroup" if version == 2 else tmp_path / "cgroup" / "memory"
    group(mount, version, 1000 * MIB, 990 * MIB, droppable=600 * MIB)

    assert read(tmp_path, proc).available_bytes == 610 * MIB


@pytest.mark.parametrize(("version", "unlimited"), [(2, "max"), (1, UNLIMITED_V1)])
def test_a_group_without_a_limit_changes_nothing(
    tmp_path: Path, version: int, unlimited: object
) -> None:
    proc = machine(tmp_path, "0::/\n" if version == 2 else "4:memory:/\n")
    mount = tmp_path / "cgroup" if version == 2 else tmp_path / "cgroup" / "memory"
    group(mount, version, unlimited, 100 * MIB)

    assert read(tmp_path, proc) == HostMemory(8000 * MIB, 6000 * MIB)


def test_the_narrowest_of_the_groups_around_the_process_counts(tmp_path: Path) -> None:
    proc = machine(tmp_path, "0::/outer/inner\n")
    group(tmp_path / "cgroup" / "outer", 2, 900 * MIB, 500 * MIB)
    group(tmp_path / "cgroup" / "outer" / "inner", 2, 800 * MIB, 100 * MIB)

    assert read(tmp_path, proc) == HostMemory(800 * MIB, 400 * MIB)


def test_a_path_out_of_the_namespace_is_not_followed(tmp_path: Path) -> None:
    proc = machine(tmp_path, "0::/../elsewhere\n")
    group(tmp_path / "elsewhere", 2, 1 * MIB, 0)
    group(tmp_path / "cgroup", 2, 700 * MIB, 0)

    assert read(tmp_path, proc).available_bytes == 700 * MIB


def test_a_group_that_holds_more_than_its_limit_has_nothing_left(tmp_path: Path) -> None:
    proc = machine(tmp_path, "0::/\n")
    group(tmp_path / "cgroup", 2, 500 * MIB, 501 * MIB)

    assert read(tmp_path, proc).available_bytes == 0


def test_the_files_of_this_machine_can_be_read() -> None:
    found = host_memory()

    assert 0 < found.available_bytes <= found.total_bytes
