"""prefixd behind the worker protocol: `python -m benchmarks.prefixd_worker`, started by `vllm_comparison.py`.

The same contestant as elsewhere, with resident prefixes: a task's prefix is published when a call first names the task,
which is its warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.worker_protocol import Message, Serve, work


def prepare(setup: Message, store: Path, stack: ExitStack) -> tuple[Serve, Mapping[str, Any]]:
    """Builds the engine, which `stack` will stop; imports what is heavy only here."""
    import torch

    from benchmarks.prefixd_contestant import Prefixd
    from benchmarks.workload import Request, load_prefix

    torch.set_num_threads(setup["threads"])
    prefixd = Prefixd(
        Path(setup["model"]),
        store,
        (),
        kv_cache_bytes=setup["kv_cache_bytes"],
        cold=False,
    )
    stack.callback(prefixd.close)
    published: set[str] = set()

    def serve(message: Message) -> Message:
        requests = tuple(
            Request(i, asked["task"], tuple(asked["prompt_token_ids"]))
            for i, asked in enumerate(message["requests"])
        )
        for task in sorted({request.task for request in requests} - published):
            prefixd.upload(load_prefix(Path(setup["prefixes"]), task))
            published.add(task)
        call = prefixd.serve(requests, message["output_len"])
        return {
            "tokens": call.tokens,
            "first_token_seconds": call.first_token_seconds,
            "seconds": call.seconds,
            "decode_step_seconds": call.decode_step_seconds,
        }

    return serve, {"torch": version("torch"), "threads": torch.get_num_threads()}


def main() -> None:
    """Serves until nobody asks any more."""
    with TemporaryDirectory(prefix="prefixd-bench-") as store, ExitStack() as stack:
        work(lambda setup: prepare(setup, Path(store), stack))


if __name__ == "__main__":
    main()
