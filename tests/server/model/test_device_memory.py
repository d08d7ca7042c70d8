"""What a device has and what a step takes of it: a GPU by a script, a GPU if there is one, and the CPU."""

from __future__ import annotations

import pytest
import torch

from server.errors import CapacityError
from server.kvcache.memory_account import MemoryUse
from server.model.device_memory import CPU_SHARE, CpuMemory, CudaMemory
from server.model.host_memory import HostMemory
from tests.kernel_support import needs_gpu

GB = 10**9
DEVICE = torch.device("cuda:0")
STEP = MemoryUse("largest step", 2 * GB, "--max-num-seqs")


class ScriptedCuda:
    """Stands in for `torch.cuda`: a GPU of 80 GB, its allocator, and what others hold."""

    def __init__(self, *, outside: int) -> None:
        self.outside = outside
        self.allocated = 0
        self.reserved = 0
        self.peak = 0
        self.calls: list[str] = []

    def take(self, num_bytes: int, *, reserved: int | None = None) -> None:
        self.allocated += num_bytes
        self.reserved += num_bytes if reserved is None else reserved
        self.peak = max(self.peak, self.reserved)

    def drop(self, num_bytes: int) -> None:
        self.allocated -= num_bytes

    def mem_get_info(self, _: torch.device) -> tuple[int, int]:
        return 80 * GB - self.outside - self.reserved, 80 * GB

    def memory_allocated(self, _: torch.device) -> int:
        return self.allocated

    def memory_reserved(self, _: torch.device) -> int:
        return self.reserved

    def max_memory_reserved(self, _: torch.device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, _: torch.device) -> None:
        self.peak = self.reserved

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.reserved = self.allocated

    def synchronize(self, _: torch.device) -> None:
        self.calls.append("synchronize")


def test_a_gpu_is_accounted_for_by_its_whole_memory() -> None:
    cuda = ScriptedCuda(outside=1 * GB)
    memory = CudaMemory(DEVICE, 0.5, cuda)
    cuda.take(16 * GB)  # the model
    cuda.outside += 3 * GB // 2  # kernels' workspaces

    account = memory.account((STEP,))

    assert (account.total_bytes, account.share) == (80 * GB, 0.5)
    assert {use.name: use.num_bytes for use in account.uses} == {
        "weights": 16 * GB,
        "largest step": 2 * GB,
        "outside of torch": 3 * GB // 2,
    }
    assert account.left_bytes == 40 * GB - 16 * GB - 2 * GB - 3 * GB // 2
    assert "--gpu-memory-utilization" in account.remedy()


def test_a_second_server_on_the_gpu_has_a_share_of_its_own() -> None:
    """As with vLLM: what others held before is theirs, as long as the share is free."""
    cuda = ScriptedCuda(outside=39 * GB)
    memory = CudaMemory(DEVICE, 0.5, cuda)
    cuda.take(16 * GB)

    assert memory.account(()).left_bytes == 24 * GB


def test_a_share_that_is_not_free_is_refused_with_the_figures() -> None:
    with pytest.raises(CapacityError, match=r"39\.0 GB free of 80\.0 GB.*0\.5 asks for 40\.0 GB"):
        CudaMemory(DEVICE, 0.5, ScriptedCuda(outside=41 * GB))


def test_the_peak_of_a_step_is_what_the_allocator_took_for_it() -> None:
    cuda = ScriptedCuda(outside=0)
    memory = CudaMemory(DEVICE, 0.9, cuda)
    cuda.take(20 * GB)
    cuda.drop(4 * GB)  # loading left 4 GB in the allocator, which no step needs

    def step() -> None:
        cuda.take(3 * GB, reserved=5 * GB)
        cuda.drop(3 * GB)

    assert memory.peak_of(step) == 5 * GB
    assert cuda.reserved == 16 * GB, "the pool can have what the step has left"
    assert cuda.calls == ["synchronize", "empty_cache", "synchronize", "empty_cache"]


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_tells_what_a_run_takes() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory = CudaMemory(device, 0.1)
    kept = torch.zeros(2**26, device=device)  # 256 MiB

    peak = memory.peak_of(lambda: (kept + 1).sum())
    account = memory.account((STEP,))

    assert 2**28 <= peak < 2**28 + 2**26
    assert account.total_bytes == torch.cuda.get_device_properties(device).total_memory
    assert account.uses[0].num_bytes >= 2**28


def test_a_cpu_is_accounted_for_by_what_is_free_with_the_weights_loaded() -> None:
    readings = iter([HostMemory(64 * GB, 40 * GB), HostMemory(64 * GB, 30 * GB)])
    memory = CpuMemory(lambda: next(readings))

    assert memory.account((STEP,)).left_bytes == CPU_SHARE * 40 * GB - 2 * GB
    assert memory.account(()).total_bytes == 30 * GB


def test_a_run_on_a_cpu_is_given_twice_what_its_tensors_take() -> None:
    ones = torch.ones(1000)

    assert CpuMemory().peak_of(lambda: torch.add(ones, 1).mul(2).sum()) in range(16_000, 16_200)
