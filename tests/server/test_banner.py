"""What the banner says of tasks that are there and can not be served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prefix_store import PrefixStore, records
from prefix_store.backends.memory import MemoryBackend
from prefix_store.validation import Limits
from server import banner
from tests.prefix_store.builders import TINY_BASE, make_artifact


def tasks_row(*damaged: str) -> str:
    """The row for the tasks `clerk` and `poet`, of which some have a damaged version log."""
    backend, limits = MemoryBackend(), Limits(max_num_virtual_tokens=16)
    store = PrefixStore(backend, TINY_BASE, limits, host_cache_bytes=0)
    for task in ("clerk", "poet"):
        store.put(task, make_artifact())
    for task in damaged:
        backend.logs[records.log_name(task)][1] = b""
    store = PrefixStore(backend, TINY_BASE, limits, host_cache_bytes=0)
    assert store.num_broken_tasks == len(damaged)
    serving: Any = SimpleNamespace(store=store, base=TINY_BASE)
    return banner._tasks([info.live for info in store.tasks() if info.live], serving)


def test_damaged_version_logs_are_told_beside_the_tasks() -> None:
    assert tasks_row() == "2 (clerk, poet)"
    assert tasks_row("poet") == "1 (clerk); 1 with a damaged version log"
    assert tasks_row("clerk", "poet").endswith("; 2 with a damaged version log")
