"""Prefixes on their way to the device: whole, within their room, and never lost for want of it."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass
from typing import Final

import pytest
import torch
from torch import Tensor

from prefix_store.artifact import Prefix
from prefix_store.spec import KVLayout, LayerLayout, PrefixManifest
from server.kvcache.kv_cache import KVCache
from server.model import prefix_transfer
from server.model.prefix_transfer import PackedPrefix, Staging, pack
from tests.kernel_support import needs_gpu

CPU: Final = torch.device("cpu")


def make_prefix(length: int = 5, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Prefix:
    """Two layers of different shapes, as models with wider values have them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(length, heads, dim, generator=generator).to(dtype)

    manifest = PrefixManifest(num_virtual_tokens=length, k_space="none", model_type="fake")
    return Prefix(f"sha256:{seed}", manifest, (draw(2, 4), draw(1, 8)), (draw(2, 6), draw(1, 8)))


def assert_same(one: Prefix, other: Prefix) -> None:
    assert (one.digest, one.manifest) == (other.digest, other.manifest)
    pairs = zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b.cpu())


def size_of(prefix: Prefix) -> int:
    return sum(tensor.nbytes for tensor in (*prefix.keys, *prefix.values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("length", [1, 5, 37])
def test_a_packed_prefix_is_the_same_in_one_buffer(length: int, dtype: torch.dtype) -> None:
    prefix = make_prefix(length, dtype=dtype)

    packed = pack(prefix, pinned=False)

    assert_same(packed, prefix)
    assert packed.buffer.nbytes == packed.num_bytes == size_of(prefix)
    start = packed.buffer.untyped_storage().data_ptr()
    for tensor in (*packed.keys, *packed.values):
        assert tensor.untyped_storage().data_ptr() == start


def test_packing_twice_copies_once() -> None:
    packed = pack(make_prefix(), pinned=False)

    assert pack(packed, pinned=False) is packed


def test_a_staged_prefix_is_a_copy_of_its_own() -> None:
    prefix = make_prefix()

    staged = Staging(CPU, size_of(prefix)).stage(prefix)

    assert_same(staged, prefix)
    prefix.keys[0].zero_()
    assert not torch.equal(staged.keys[0], prefix.keys[0])


def test_what_finds_no_room_is_handed_over_where_it_is() -> None:
    first, second = pack(make_prefix(seed=1), pinned=False), pack(make_prefix(seed=2), pinned=False)
    staging = Staging(CPU, size_of(first) + 1)

    kept = staging.stage(first)

    assert kept is not first
    assert staging.stage(second) is second


def test_room_comes_back_when_nobody_holds_a_staged_prefix_any_more() -> None:
    prefix = pack(make_prefix(), pinned=False)
    staging = Staging(CPU, size_of(prefix))
    for _ in range(3):
        staged = staging.stage(prefix)
        assert staged is not prefix
        assert staging.stage(prefix) is prefix, "while one is held there is no room"
        del staged
        gc.collect()


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("full"), RuntimeError("the bus")])
def test_a_failed_transfer_gives_its_room_back(
    failure: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = pack(make_prefix(), pinned=False)
    staging = Staging(CPU, size_of(prefix))

    def fail(*_: object) -> Tensor:
        raise failure

    with monkeypatch.context() as broken:
        broken.setattr(Staging, "_transferred", fail)
        if isinstance(failure, torch.OutOfMemoryError):
            assert staging.stage(prefix) is prefix, "no memory is no reason to fail a request"
        else:
            with pytest.raises(RuntimeError, match="the bus"):
                staging.stage(prefix)

    assert staging.stage(prefix) is not prefix


def test_many_threads_never_take_more_than_there_is() -> None:
    prefix = pack(make_prefix(), pinned=False)
    staging = Staging(CPU, 3 * size_of(prefix))
    held: list[Prefix] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        held.append(staging.stage(prefix))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(found is not prefix for found in held) == 3


@dataclass
class _PinnedBuffer:
    """Says that it is pinned, which needs a GPU to be true."""

    nbytes: int

    def is_pinned(self) -> bool:
        return True


@pytest.mark.parametrize(("size", "held"), [(1, 1), (4096, 4096), (4097, 8192), (3 << 20, 4 << 20)])
def test_pinned_memory_counts_as_the_power_of_two_that_it_takes(size: int, held: int) -> None:
    prefix = make_prefix()
    buffer: Tensor = _PinnedBuffer(size)  # type: ignore[assignment] # the two things that are asked of it

    packed = PackedPrefix(prefix.digest, prefix.manifest, prefix.keys, prefix.values, buffer)

    assert packed.num_bytes == held


def make_cache(device: torch.device) -> KVCache:
    layers = (LayerLayout(2, 4, 6), LayerLayout(1, 8, 8))
    return KVCache(KVLayout(layers, "bfloat16"), 8, 4, device)


@needs_gpu
def test_on_a_gpu_a_prefix_arrives_while_the_main_stream_is_busy() -> None:
    """The worker is not held up by the step under way, and the pool reads what was sent."""
    device = torch.device("cuda")
    staging, cache = Staging(device), make_cache(device)
    prefix = pack(make_prefix(), pinned=True)
    assert prefix.buffer.is_pinned()
    busy = torch.randn(8192, 8192, device=device)
    for _ in range(50):
        busy = (busy @ busy).clamp_(-1, 1)
    step = torch.cuda.current_stream().record_event()

    staged = staging.stage(prefix)

    assert not step.query(), "the transfer waited for the step"
    assert staged.keys[0].is_cuda
    cache.write_prefix((3, 5), staged)
    slots = cache.slots((3, 5), 5).to(device)
    for layer, keys, values in zip(cache.layers, prefix.keys, prefix.values, strict=True):
        assert torch.equal(layer.keys[slots].cpu(), keys)
        assert torch.equal(layer.values[slots].cpu(), values)


@needs_gpu
def test_on_a_gpu_staged_memory_is_not_used_again_before_it_was_read() -> None:
    device = torch.device("cuda")
    staging, cache = Staging(device), make_cache(device)
    torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call] # the main stream reads late
    cache.write_prefix((1, 2), staging.stage(pack(make_prefix(seed=1), pinned=True)))
    others = [staging.stage(pack(make_prefix(seed=seed), pinned=True)) for seed in range(2, 12)]

    slots = cache.slots((1, 2), 5).to(device)
    assert torch.equal(cache.layers[0].keys[slots].cpu(), make_prefix(seed=1).keys[0])
    assert len(others) == 10


def test_the_default_room_holds_two_long_prefixes_of_an_8b_model() -> None:
    llama_8b_bytes_per_token = 131_072

    assert prefix_transfer.STAGING_BYTES // (2_048 * llama_8b_bytes_per_token) == 2
