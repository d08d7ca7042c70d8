"""A worker process as a contestant, and what it is told.

Driver side only. The setup says which model, which text stands for each task, and how much is asked at most:
`{"model": folder, "dtype": name, "prefixes": folder, "texts": {task: ids}, "max_num_seqs": n, "max_model_len": n,
"kv_cache_bytes": n, "threads": n}`. A call is `{"requests": [{"task": t, "prompt_token_ids": ids}, ...],
"output_len": n}`, its answer has the fields of `Call` but for the requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.contest import Call
from benchmarks.worker_protocol import Worker
from benchmarks.workload import Request


class WorkerContestant:
    """All requests in one call, as both programs compared take them."""

    def __init__(self, worker: Worker, description: str, task: str) -> None:
        """`task`: whose prefix all requests have."""
        self._worker = worker
        self._task = task
        self.name: Final = worker.name
        self.description: Final = description

    def calls(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """One call."""
        return [tuple(requests)]

    def serve(self, requests: tuple[Request, ...], output_len: int) -> Call:
        asked = [{"task": self._task, "prompt_token_ids": r.prompt_token_ids} for r in requests]
        answer = self._worker.ask({"requests": asked, "output_len": output_len})
        return Call(
            requests=requests,
            tokens=tuple(tuple(tokens) for tokens in answer["tokens"]),
            first_token_seconds=tuple(answer["first_token_seconds"]),
            seconds=answer["seconds"],
            decode_step_seconds=tuple(answer["decode_step_seconds"]),
        )

    def close(self) -> None:
        """Who started the worker ends it: it serves other cases too."""
