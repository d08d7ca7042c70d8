"""Compiles the kernels for GPUs that are not here, as far as machine code; prints one line for each.

Run by `test_compile.py` in a process of its own, since Triton decides at import whether it interprets.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.kernels import decode_partials, merge_partials

_DECODE: dict[str, str] = {
    "queries": "*{dtype}",
    "keys": "*{dtype}",
    "values": "*{dtype}",
    "partial_out": "*fp32",
    "partial_lse": "*fp32",
    "scale": "fp32",
} | dict.fromkeys(
    ["items", "tokens", "kv_lens", "prefix_lens", "part_offsets", "block_table"], "*i32"
)
_MERGE: dict[str, str] = {
    "partial_out": "*fp32",
    "partial_lse": "*fp32",
    "sinks": "*{dtype}",
    "out": "*{dtype}",
    "tokens": "*i32",
    "part_offsets": "*i32",
}


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int
) -> int:
    """Bytes of shared memory that a program takes; machine code was made."""
    names = inspect.signature(kernel.fn).parameters
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={**options, "enable_fp_fusion": True}
    )
    assert built.asm["cubin"]
    return int(built.metadata.shared)


def jobs() -> Iterator[tuple[str, int, int, bool]]:
    """dtype, head dim, group and whether window, softcap and sinks are on; all that tiles depend on."""
    yield "bf16", 128, 4, False
    yield "fp16", 256, 8, True
    yield "fp32", 64, 7, True


def main() -> None:
    for arch in (80, 90):
        for dtype, head_dim, group, features in jobs():
            wide = head_dim > 128 or dtype == "fp32"
            constants = {
                "GROUP": group,
                "DK": head_dim,
                "DV": head_dim,
                "DK_PAD": head_dim,
                "DV_PAD": head_dim,
                "BLOCK_SIZE": 16,
                "WINDOW": 1024 if features else 0,
                "SOFTCAP": 30.0 if features else 0.0,
                "ITEM_FIELDS": 5,
                "LOG2E": decode_partials.LOG2_E,
                "BLOCK_M": decode_partials.block_m(group),
                "BLOCK_N": 32 if wide else 64,
            }
            types = {name: kind.format(dtype=dtype) for name, kind in _DECODE.items()}
            kernel = decode_partials._decode_partials_kernel
            size = compile_kernel(kernel, types, constants, arch, num_warps=4, num_stages=2)
            print(f"decode sm_{arch} {dtype} {head_dim} {size}")
            constants = {
                "DV": head_dim,
                "DV_PAD": head_dim,
                "HAS_SINKS": features,
                "LOG2E": decode_partials.LOG2_E,
                "PARTS": 8,
            }
            types = {name: kind.format(dtype=dtype) for name, kind in _MERGE.items()}
            kernel = merge_partials._merge_partials_kernel
            size = compile_kernel(kernel, types, constants, arch, num_warps=1)
            print(f"merge sm_{arch} {dtype} {head_dim} {size}")


if __name__ == "__main__":
    main()
