"""Starts real `prefixd serve` processes that do not have to import torch first, so they can be killed by the thousand.

A warm process (`python -m tests.e2e.warm_server MODEL LOG`) imports what the server needs, loads and drops the model
once to fill the caches of transformers, and then forks for each start. The fork happens with one thread and nothing
open; everything that the server keeps (socket, model, store, engine, threads) it makes after it, in `server.cli.main`.
Called by `kill_loop`.

    start ARG ...    ->  started PID          (tab-separated; a server runs until it is killed)
    kill             ->  ended STATUS         (of waitpid: minus the signal, or the exit code)
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
from types import TracebackType
from typing import Final

from tests.e2e import planted_store_bugs
from tests.e2e.live_server import ADMIN_KEY

# What `prefixd serve` imports until it has answered its first upload, as far as it is slow.
WANTED_BY_A_SERVER: Final = (
    "anyio._backends._asyncio",
    "encodings.idna",
    "pydantic.v1",
    "server.banner",
    "server.bootstrap",
    "server.cli",
    "server.http.app",
    "server.model.attention.sdpa",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl",
)


class WarmServer:
    """One server at a time; a context manager, which leaves no process behind."""

    def __init__(self, model: Path, log: Path, planted_bug: str | None = None) -> None:
        """`log`: what the present server prints; emptied at each start. `planted_bug`: see `main`."""
        self._log = log
        environment = {
            **os.environ,
            "PREFIXD_ADMIN_KEY": ADMIN_KEY,
            "PREFIXD_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.e2e.warm_server", str(model), str(log)]
        command += [planted_bug] if planted_bug else []
        self._process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, text=True, bufsize=1, env=environment
        )

    def __enter__(self) -> WarmServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the warm process kills its server, and ends
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start(self, *arguments: str) -> None:
        """`prefixd ARGUMENTS`, on its way up when this returns."""
        self._ask("start\t" + "\t".join(arguments), "started")

    def kill(self) -> None:
        """SIGKILL. Raises `AssertionError` if the server had ended by itself."""
        status = int(self._ask("kill", "ended"))
        assert status == -signal.SIGKILL, f"the server ended by itself ({status}):\n{self.output()}"

    def output(self) -> str:
        """What the present or last server printed."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _ask(self, line: str, expected: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        word, _, rest = self._process.stdout.readline().strip().partition(" ")
        assert word == expected, f"the warm process answered {word!r}:\n{self.output()}"
        return rest


def main(model: Path, log: Path, planted_bug: str | None = None) -> None:
    """The warm process: one line in, one line out, until stdin ends.

    `planted_bug`: a function of `planted_store_bugs` to call first, to see that the kill loop notices it.
    """
    for module in WANTED_BY_A_SERVER:
        importlib.import_module(module)
    load_model = importlib.import_module("server.bootstrap").load_model
    load_model(model, device="cpu", dtype="auto")
    if planted_bug is not None:
        getattr(planted_store_bugs, planted_bug)()
    child = 0
    for line in sys.stdin:
        word, *arguments = line.rstrip("\n").split("\t")
        if word == "start":
            assert not child, "one server at a time"
            wait_for_one_thread()
            child = os.fork()
            if not child:
                serve(arguments, log)
            say(f"started {child}")
        else:
            say(f"ended {killed(child)}")
            child = 0
    if child:
        killed(child)


def wait_for_one_thread() -> None:
    """The threads that transformers loaded the model with may still be ending."""
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/task")) > 1:
        assert time.monotonic() < deadline, "a fork copies one thread only"
        time.sleep(0.01)


def serve(arguments: list[str], log: Path) -> None:
    """In the child: stdin and output of its own, then the command line as the console script calls it."""
    import server.cli

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    server.cli.main(arguments)


def killed(child: int) -> int:
    os.kill(child, signal.SIGKILL)  # it is our child and not waited for, so the id is still its own
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
