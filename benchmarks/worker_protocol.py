"""How a driver speaks with a contestant that lives in a process, and an environment, of its own.

One JSON object a line over the worker's standard input and output: the driver sends the setup, the worker answers
`{"ready": facts}` when it can serve; then each line asks for one call and is answered by one line. A worker does
nothing between calls, so that the other one can be measured. Whatever its libraries print goes to its log.

Standard library only: workers run in environments where the rest of this package does not import.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

Message = dict[str, Any]
Serve = Callable[[Message], Message]
_REPOSITORY: Final = Path(__file__).resolve().parent.parent
_LOG_TAIL: Final = 3000  # characters


class Worker:
    """The driver's side: a process that was started and has said that it is ready."""

    def __init__(self, name: str, command: Sequence[str], setup: Message, log: Path) -> None:
        """Returns when it is ready, after `start_seconds`; raises `RuntimeError` with its log if it ends."""
        self.name: Final = name
        self._log = log
        started = time.perf_counter()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=_REPOSITORY,
            )
        self.facts: Final[Message] = self.ask(setup)["ready"]
        self.start_seconds: Final = time.perf_counter() - started

    def ask(self, message: Message) -> Message:
        """Waits for the answer, however long it takes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its log says more than this would
            print(json.dumps(message), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self.close()
            status = self._process.returncode
            tail = self._log.read_text(errors="replace")[-_LOG_TAIL:]
            raise RuntimeError(f"worker {self.name} ended with status {status}:\n{tail}")
        answer: Message = json.loads(line)
        return answer

    def close(self) -> None:
        """A worker ends when it is asked no more."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a message that it did not live to read
                    pipe.close()
        self._process.wait(timeout=60)


def work(prepare: Callable[[Message], tuple[Serve, Mapping[str, Any]]]) -> None:
    """The worker's side: `prepare` gets the setup, and gives what serves a call and facts about itself."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve, facts = prepare(json.loads(sys.stdin.readline()))
    print(json.dumps({"ready": dict(facts)}), file=answers)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers)
