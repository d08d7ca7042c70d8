"""Stages of `gpu.py` without a model: the machine's ceilings, the decode kernels' correctness and speed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu_shapes import Figure, ModelShape, Sizes
from benchmarks.gpu_timing import clock_ms, kernel_ms, ratio
from server.kernels.decode_partials import (
    Tiles,
    block_m,
    decode_partials,
    decode_partials_in_torch,
    rows_per_item,
)
from server.kernels.merge_partials import merge_partials, merge_partials_in_torch
from server.kernels.work_tables import WorkTables
from server.model.attention.triton import pack_plan, shape_for
from server.model.attention.work_items import DecodeRow, plan_work

_BLOCK_SIZE: Final = 16
# A GPU keeps tens of megabytes; calls that are timed one after another read different memory, up to this much.
_UNCACHED_BYTES: Final = 2**29
_TILES: Final = [  # block_m as the group needs it, and these
    (64, 4, 2),
    (64, 4, 3),
    (64, 2, 3),
    (64, 8, 2),
    (32, 4, 3),
    (32, 2, 4),
    (128, 4, 2),
    (128, 8, 3),
]


def ceilings(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Copies, reads and multiplies as fast as torch can, in this very run."""
    dtype = torch.bfloat16
    source = torch.ones(sizes.copy_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    ms = kernel_ms(lambda _: target.copy_(source), device, sizes.repeats)
    yield Figure("ceilings", "copy", 2 * source.nbytes / ms / 1e9, "TB/s", note="read and written")
    ms = kernel_ms(lambda _: source.sum(), device, sizes.repeats)
    yield Figure("ceilings", "read", source.nbytes / ms / 1e9, "TB/s")
    left = torch.randn(sizes.matrix_size, sizes.matrix_size, device=device).to(dtype)
    right = torch.randn(sizes.matrix_size, sizes.matrix_size, device=device).to(dtype)
    ms = kernel_ms(lambda _: left @ right, device, sizes.repeats)
    yield Figure("ceilings", "multiply", 2 * sizes.matrix_size**3 / ms / 1e9, "TFLOP/s")
    host = torch.ones(sizes.copy_bytes // 16, dtype=torch.float32)
    if device.type == "cuda":
        host = host.pin_memory()
    ms = clock_ms(lambda: target[: len(host)].copy_(host, non_blocking=True), device, 5)
    yield Figure("ceilings", "host to device, pinned", host.nbytes / ms / 1e6, "GB/s")


@dataclass(frozen=True, slots=True)
class Bench:
    """Pools of several layers, one step's rows, and the two kernels on them."""

    queries: Tensor
    pools: tuple[tuple[Tensor, Tensor], ...]
    rows: tuple[DecodeRow, ...]
    shape: ModelShape

    @classmethod
    def make(
        cls, shape: ModelShape, rows: list[DecodeRow], device: torch.device, dtype: torch.dtype
    ) -> Bench:
        used = {b for row in rows for b in (*row.prefix_block_ids, *row.own_block_ids)}
        slots = (max(used) + 1) * _BLOCK_SIZE
        heads, dim = shape.num_kv_heads, shape.head_dim
        layer_bytes = 2 * slots * heads * dim * dtype.itemsize
        num_layers = min(8, -(-_UNCACHED_BYTES // layer_bytes)) if device.type == "cuda" else 1

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=torch.float32).to(dtype)

        pools = tuple((draw(slots, heads, dim), draw(slots, heads, dim)) for _ in range(num_layers))
        return cls(draw(len(rows), shape.num_query_heads, dim), pools, tuple(rows), shape)

    @property
    def group(self) -> int:
        return self.shape.num_query_heads // self.shape.num_kv_heads

    def tables(self, *, grouped: bool = True, window: int | None = None) -> WorkTables:
        together = rows_per_item(self.group)
        plan = plan_work(self.rows, rows_per_item=together, window=window, grouped=grouped)
        plan.check_invariants(together, window)
        room = shape_for(plan)
        return WorkTables.of(pack_plan(plan, room).to(self.queries.device), room)

    def runner(
        self, tables: WorkTables, tiles: Tiles | None = None, **features: Any
    ) -> Callable[[int], Tensor]:
        """A function that runs both kernels on layer i of the pools."""
        sinks = features.pop("sinks", None)

        def run(i: int) -> Tensor:
            keys, values = self.pools[i % len(self.pools)]
            out = torch.empty_like(self.queries)
            partial = decode_partials(
                self.queries,
                keys,
                values,
                tables,
                block_size=_BLOCK_SIZE,
                scale=self.shape.head_dim**-0.5,
                tiles=tiles,
                **features,
            )
            merge_partials(*partial, tables, out, sinks=sinks)
            return out

        return run

    def least_bytes(self, *, grouped: bool) -> float:
        """Keys and values of one layer that have to be read: a prefix once, or once per row."""
        prefixes = {row.prefix_block_ids: row.prefix_len for row in self.rows}
        shared = sum(prefixes.values()) if grouped else sum(row.prefix_len for row in self.rows)
        tokens = shared + sum(row.kv_len - row.prefix_len for row in self.rows)
        return (
            tokens
            * self.shape.kv_bytes_per_token(self.queries.element_size())
            / (self.shape.num_layers)
        )


def make_rows(num_rows: int, own_len: int, prefix_len: int, num_tasks: int) -> list[DecodeRow]:
    """Rows of equal length whose tasks take turns, in shuffled blocks. Block 0 stays free."""
    per_prefix, per_row = -(-prefix_len // _BLOCK_SIZE), -(-own_len // _BLOCK_SIZE)
    free = list(range(1, 1 + num_tasks * per_prefix + num_rows * per_row))
    random.Random(0).shuffle(free)
    prefixes = [tuple(free.pop() for _ in range(per_prefix)) for _ in range(num_tasks)]
    return [
        DecodeRow(
            token=row,
            kv_len=prefix_len + own_len,
            prefix_len=prefix_len,
            prefix_block_ids=prefixes[row % num_tasks],
            own_block_ids=tuple(free.pop() for _ in range(per_row)),
        )
        for row in range(num_rows)
    ]


def correctness(
    shapes: list[ModelShape], device: torch.device, dtype: torch.dtype
) -> Iterator[Figure]:
    """Largest error against float64, relative to the largest value; bits alone, in a batch, grouped and not."""
    num_rows = 20 if device.type == "cuda" else 3
    for shape in shapes:
        rows = make_rows(num_rows, 300 if num_rows > 3 else 30, 300, 3)
        bench = Bench.make(shape, rows, device, dtype)
        sinks = torch.linspace(-1, 2, shape.num_query_heads, device=device)
        features: dict[str, dict[str, Any]] = {
            "plain": {},
            "window": {"window": 128},
            "softcap, sinks": {"softcap": 20.0, "sinks": sinks},
        }
        for name, feature in features.items():
            tables = bench.tables(window=feature.get("window"))
            ours = bench.runner(tables, **feature)(0).double()
            expected = _in_double(bench, tables, dict(feature))
            error = float((ours - expected).abs().max() / expected.abs().max())
            yield Figure("correctness", f"{shape.name} {name}", error, f"relative error, {dtype}")
        together = bench.runner(bench.tables())(0)
        apart = bench.runner(bench.tables(grouped=False))(0)
        alone = torch.cat([_alone(bench, row) for row in bench.rows])
        yield _equal(f"{shape.name} grouped equals ungrouped", together, apart)
        yield _equal(f"{shape.name} alone equals in the batch", together, alone)


def _in_double(bench: Bench, tables: WorkTables, feature: dict[str, Any]) -> Tensor:
    sinks = feature.pop("sinks", None)
    queries, (keys, values) = bench.queries.double(), bench.pools[0]
    partial = decode_partials_in_torch(
        queries,
        keys.double(),
        values.double(),
        tables,
        block_size=_BLOCK_SIZE,
        scale=bench.shape.head_dim**-0.5,
        **feature,
    )
    out = torch.empty_like(queries)
    merge_partials_in_torch(*partial, tables, out, sinks=sinks)
    return out


def _alone(bench: Bench, row: DecodeRow) -> Tensor:
    queries = bench.queries[row.token : row.token + 1]
    lone = DecodeRow(0, row.kv_len, row.prefix_len, row.prefix_block_ids, row.own_block_ids)
    single = Bench(queries, bench.pools, (lone,), bench.shape)
    return single.runner(single.tables())(0)


def _equal(name: str, one: Tensor, other: Tensor) -> Figure:
    different = int((one != other).any(-1).any(-1).sum())
    return Figure("correctness", name, float(different), f"rows of {len(one)} with other bits")


def kernel_sweep(
    shapes: list[ModelShape], sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Iterator[Figure]:
    """Both decode kernels on one layer, as served and with other tiles."""
    for shape, (num_rows, own_len) in product(shapes, sizes.kernel_cases):
        bench = Bench.make(shape, make_rows(num_rows, own_len, 0, 1), device, dtype)
        tables, least = bench.tables(), bench.least_bytes(grouped=True)
        name = f"{shape.name} B={num_rows} ctx={own_len}"
        ms = kernel_ms(bench.runner(tables), device, sizes.repeats)
        yield Figure("kernels", f"{name} as served", ms, "ms", least)
        if (num_rows, own_len) != sizes.kernel_cases[0]:
            continue
        best, described = math.inf, "none"
        for block_n, num_warps, num_stages in _TILES:
            tiles = Tiles(block_m(bench.group), block_n, num_warps, num_stages)
            try:
                ms = kernel_ms(bench.runner(tables, tiles), device, sizes.repeats)
            except Exception as error:  # noqa: BLE001 - tiles that do not fit this GPU are a result too
                described = (
                    f"{described}; {block_n}/{num_warps}/{num_stages}: {type(error).__name__}"
                )
                continue
            if ms < best:
                best, described = ms, f"block_n {block_n}, {num_warps} warps, {num_stages} stages"
        if math.isfinite(best):
            yield Figure("kernels", f"{name} best tiles", best, "ms", least, note=described)


def grouped_kernels(
    shapes: list[ModelShape], sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Iterator[Figure]:
    """A shared prefix read once per group of its rows, against once per row."""
    for shape, (prefix_len, num_rows, num_tasks) in product(shapes, sizes.grouped_cases):
        rows = make_rows(num_rows, sizes.context_len, prefix_len, num_tasks)
        bench = Bench.make(shape, rows, device, dtype)
        name = f"{shape.name} P={prefix_len} B={num_rows} T={num_tasks}"
        times = {}
        for grouped in (True, False):
            run = bench.runner(bench.tables(grouped=grouped))
            times[grouped] = kernel_ms(run, device, sizes.repeats)
            least = bench.least_bytes(grouped=grouped)
            label = "grouped" if grouped else "ungrouped"
            yield Figure("grouped kernels", f"{name} {label}", times[grouped], "ms", least)
        gain = ratio(times[False], times[True])
        yield Figure("grouped kernels", f"kernel grouped {name}", gain, "x")
        del bench
