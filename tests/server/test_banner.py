"""What the banner says of tasks that are there and can not be served."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefix_store import PrefixStore, records
from prefix_store.backends.memory import MemoryBackend
from prefix_store.key_store import KeyStore
from prefix_store.keys import KeyScope
from prefix_store.validation import Limits
from server import banner
from server.config import ServeConfig
from server.kvcache.memory_account import MemoryAccount, MemoryUse
from server.kvcache.pool_plan import PoolPlan
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


def test_the_memory_is_shown_a_term_a_line_and_what_the_pool_fits() -> None:
    account = MemoryAccount("memory of cuda:0", 10**10, 0.9, (MemoryUse("weights", 10**9),))
    pool = PoolPlan(101, 16, 50_000, 400, account)

    rows = banner._memory(pool)

    assert [(name, " ".join(text.split())) for name, text in rows] == [
        ("memory", "memory of cuda:0 10.0 GB"),
        ("", "x 0.9 9.0 GB"),
        ("", "- weights 1.0 GB"),
        ("", "= left for the KV pool 8.0 GB"),
        (
            "KV blocks",
            "100 of 16 tokens, 5.0 MB -> 1600 tokens -> fits 4 requests of 400 tokens, or 50 prefixes of 32",
        ),
    ]
    assert [name for name, _ in banner._memory(PoolPlan(101, 16, 50_000, 400))] == ["KV blocks"]


def test_it_says_whether_inference_asks_for_a_key(tmp_path: Path) -> None:
    def asks(**settings: Any) -> bool:
        config = ServeConfig(store=tmp_path, **settings)
        application: Any = SimpleNamespace(serving=SimpleNamespace(config=config))
        return banner._asks_for_key(application)

    assert not asks()
    assert asks(api_key="12345678")
    KeyStore(tmp_path / "keys").create("acme", frozenset({KeyScope.INFER}))
    assert asks()
