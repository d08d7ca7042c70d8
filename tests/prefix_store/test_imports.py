"""The parts that the scheduler and the command line use load no tensor library."""

from __future__ import annotations

import subprocess
import sys

import pytest

import prefix_store

TORCH_FREE = ["spec", "errors", "catalog", "lru", "host_cache", "header"]
TORCH_FREE += ["backends.filesystem", "backends.memory"]


def test_catalog_and_backends_do_not_load_torch() -> None:
    modules = ", ".join(f"prefix_store.{name}" for name in TORCH_FREE)
    code = f"import sys, prefix_store, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_listed_in_order() -> None:
    assert prefix_store.__all__ == sorted(prefix_store.__all__)
    for name in prefix_store.__all__:
        assert getattr(prefix_store, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Adapter'"):
        _ = prefix_store.Adapter
