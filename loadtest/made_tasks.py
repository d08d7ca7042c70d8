"""Tasks with random prefixes, for the time of a load test: uploaded before it, removed after it, also after Ctrl-C.

Main thread. What a prefix says does not matter to how long it takes; its size does, so it has the server's number format.
A name that exists already is never touched: uploads ask for an absent task, and what is removed must still have the
bytes that were uploaded here.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from loadtest.errors import BadLoad, LoadTestError
from loadtest.server_view import ServerView
from prefix_store.header import Shape, tensor_names, write_header
from prefix_store.spec import BaseModelRef, PrefixManifest, check_task_name

OnProgress = Callable[[str, int, int], None]
"""What is done, how many of them are, and of how many."""

_SPREAD: Final = 0.02  # standard deviation: small enough to be no strange prefix
_GONE: Final = (404, 412)  # somebody else's now, or nobody's


def random_prefix(base: dict[str, Any], num_virtual_tokens: int, seed: int) -> bytes:
    """An artifact that fits `base`, an answer of `GET /admin/v1/base`. Raises `BadLoad` if it allows no such length."""
    longest = min(base["max_num_virtual_tokens"], base["max_model_len"] - 2)
    if not 1 <= num_virtual_tokens <= longest:
        raise BadLoad(f"--num-virtual-tokens {num_virtual_tokens}: the server takes 1 to {longest}")
    manifest = PrefixManifest(
        num_virtual_tokens=num_virtual_tokens,
        k_space="post_rope" if base["position_scheme"] == "rope" else "none",
        model_type=base["model_type"],
        rope_theta=base["rope_theta"],
        base_model=BaseModelRef(**base["base_model"]),
        description="random, made by prefixd bench; safe to delete",
    )
    shapes: list[Shape] = []
    for layer in base["layers"]:
        heads = layer["num_kv_heads"]
        shapes.append((num_virtual_tokens, heads, layer["key_dim"]))
        shapes.append((num_virtual_tokens, heads, layer["value_dim"]))
    names = tensor_names(len(base["layers"]))
    header = write_header(manifest, base["dtype"], dict(zip(names, shapes, strict=True)))
    count = sum(tokens * heads * dim for tokens, heads, dim in shapes)
    return header + _random_bytes(count, base["dtype"], seed)


def _random_bytes(count: int, dtype: str, seed: int) -> bytes:
    """`count` normal numbers in the file's number format."""
    values = np.random.default_rng(seed).standard_normal(count, dtype=np.float32) * _SPREAD
    if dtype == "bfloat16":  # the upper half of a float32
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()


class MadeTasks:
    """The tasks that were, or may have been, uploaded: name to digest."""

    def __init__(self, server: ServerView, prefix: str, on_progress: OnProgress) -> None:
        self._server = server
        self._prefix = prefix
        self._on_progress = on_progress
        self._digests: dict[str, str] = {}

    def upload(self, count: int, num_virtual_tokens: int, seed: int) -> list[str]:
        """Makes `PREFIX-0001` and so on; their names. Raises `LoadTestError`."""
        base = self._server.base()
        names = [check_task_name(f"{self._prefix}-{number:04d}") for number in range(1, count + 1)]
        for number, name in enumerate(names):
            self._on_progress("making tasks", number, count)
            data = random_prefix(base, num_virtual_tokens, seed + number)
            self._digests[name] = (
                f"sha256:{hashlib.sha256(data).hexdigest()}"  # before: an answer may get lost
            )
            answer = self._server.admin(
                "PUT", f"/tasks/{name}", content=data, headers={"if-none-match": "*"}
            )
            if answer.status_code == 412:
                del self._digests[name]  # not ours, whatever its bytes are
            if answer.status_code != 201:
                raise _refused(name, answer.status_code, answer.text)
        self._on_progress("making tasks", count, count)
        return names

    def remove(self) -> list[str]:
        """Removes what was made; the names that are left because the server does not answer any more."""
        left: list[str] = []
        count = len(self._digests)
        for number, (name, digest) in enumerate(self._digests.items()):
            self._on_progress("removing tasks", number, count)
            if left:  # one refusal is enough to know; it would take minutes for thousands
                left.append(name)
                continue
            try:
                answer = self._server.admin(
                    "DELETE", f"/tasks/{name}", headers={"if-match": f'"{digest}"'}
                )
            except LoadTestError:
                left.append(name)
                continue
            if answer.status_code not in (204, *_GONE):
                left.append(name)
        self._on_progress("removing tasks", count, count)
        return left


@contextlib.contextmanager
def made_tasks(
    tasks: MadeTasks, count: int, num_virtual_tokens: int, seed: int, *, keep: bool
) -> Iterator[list[str]]:
    """The names of `count` tasks, which are there until the block is left; `keep`: and after it.

    Raises `LoadTestError` also if they could not be removed, with their names.
    """
    try:
        yield tasks.upload(count, num_virtual_tokens, seed)
    finally:
        if not keep:
            with _uninterrupted():
                left = tasks.remove()
            if left:
                raise LoadTestError(
                    f"{len(left)} tasks could not be removed, {left[0]} to {left[-1]}: prefixd tasks rm NAME"
                )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave half of the tasks behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _refused(name: str, status: int, text: str) -> LoadTestError:
    if status == 412:
        return LoadTestError(
            f"the server has a task {name} already: pass another --name-prefix, or remove it"
        )
    return LoadTestError(f"{name}: expected the upload to be taken, got {status} {text[:300]}")
