"""The kernels through the real compiler, which refuses things that the interpreter takes. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel_support import needs_triton

# The least that a supported GPU gives a program, that of consumer Ampere and Ada.
SHARED_BYTES = 99 * 1024


@needs_triton
@pytest.mark.timeout(900)  # some 15 s of work, minutes on a machine that is busy with other things
def test_the_kernels_compile_for_ampere_and_hopper_and_fit_shared_memory(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.kernels.compile_for_gpu"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    shared = {line.rpartition(" ")[0]: int(line.split()[-1]) for line in done.stdout.splitlines()}
    assert len(shared) == 12
    assert max(shared.values()) <= SHARED_BYTES, shared
