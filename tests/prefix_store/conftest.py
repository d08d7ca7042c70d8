"""Both backends, each as something that can be opened, closed and opened again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefix_store.backends.base import Backend
from prefix_store.backends.filesystem import FilesystemBackend
from prefix_store.backends.memory import MemoryBackend

OpenBackend = Callable[[], Backend]


@pytest.fixture(params=["memory", "filesystem"])
def open_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenBackend]:
    """Closes the backend opened before, and opens the same place again."""
    memory = MemoryBackend()
    opened: list[Backend] = []

    def open_again() -> Backend:
        for backend in opened:
            backend.close()
        opened.append(
            memory if request.param == "memory" else FilesystemBackend(tmp_path / "store")
        )
        return opened[-1]

    yield open_again
    for backend in opened:
        backend.close()
