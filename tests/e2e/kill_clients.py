"""The clients of the kill loop: each changes tasks of its own over HTTP and remembers what was acknowledged.

A client is one thread with one connection. It stops when the connection breaks, and keeps the change that was under way:
after the restart the task must be as before it or as after it. Called by `kill_loop`.
"""

from __future__ import annotations

import http.client
import json
import random
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from prefix_store.artifact import encode
from prefix_store.spec import PrefixManifest, digest_of
from tests.e2e.expected_tasks import ExpectedTask
from tests.e2e.live_server import ADMIN

HOST: Final = "127.0.0.1"
SHARED: Final = "shared"
_LENGTHS: Final = (1, 2, 3, 5, 8, 20, 50, 120, 300)  # virtual tokens: 0.4 to 115 KB
_SLOW_PIECE_BYTES: Final = 16 * 1024


class Artifacts:
    """Valid artifacts for the tiny Llama of `tiny_model_dir`; any thread."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._bases = []
        for length in _LENGTHS:
            layers = [torch.randn(length, 2, 8, generator=generator) for _ in range(6)]
            manifest = PrefixManifest(
                num_virtual_tokens=length, k_space="post_rope", model_type="llama"
            )
            self._bases.append(encode(manifest, layers[:3], layers[3:]))
        self._recent = deque([self._bases[0]], maxlen=12)

    def fresh(self, rng: random.Random) -> bytes:
        """Bytes that were never uploaded before: the last two numbers of an artifact are drawn."""
        return rng.choice(self._bases)[:-8] + struct.pack("<2f", rng.random(), rng.random())

    def fresh_or_recent(self, rng: random.Random) -> bytes:
        """Or such as a client uploaded lately, so that tasks share blobs, and one frees what another names."""
        if rng.random() < 0.7:
            self._recent.append(self.fresh(rng))
        return rng.choice(self._recent)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said; `request_id` is what the audit log calls the request."""

    status: int
    body: bytes
    request_id: str

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One kept-alive connection with the admin key. Raises `OSError` or `HTTPException` when it breaks."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=30)

    def ask(
        self, method: str, path: str, body: bytes | Iterator[bytes] = b"", length: int | None = None
    ) -> Answer:
        """`length`: of a body that comes in pieces."""
        headers = {**ADMIN, "content-type": "application/json"}  # an upload's is not looked at
        if length is not None:
            headers["content-length"] = str(length)
        self._connection.request(method, path, body=body, headers=headers)
        with self._connection.getresponse() as response:
            return Answer(
                response.status, response.read(), response.headers.get("x-request-id", "")
            )

    def close(self) -> None:
        self._connection.close()


@dataclass
class SharedTask:
    """A task that all clients upload to at once: each version has bytes of its own and becomes live.

    Who came first is not known, so less is asked of it: acknowledged numbers keep their digests, what else is there
    was under way, and numbers have no gap.
    """

    acknowledged: dict[int, str] = field(default_factory=dict)
    under_way: set[str] = field(default_factory=set)
    num_versions: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Change:
    """A request, and the task after it."""

    task: str
    kind: str
    method: str
    path: str
    after: ExpectedTask
    body: bytes = b""


class Client:
    """`tasks`: as acknowledged. `under_way`: the change whose outcome nobody learnt, until it is settled."""

    def __init__(self, name: str, seed: int, artifacts: Artifacts, shared: SharedTask) -> None:
        self._rng = random.Random(seed)
        self._artifacts = artifacts
        self._shared = shared
        self.tasks = {f"{name}-{letter}": ExpectedTask() for letter in "ab"}
        self.under_way: Change | None = None
        self.recorded: dict[str, int] = {}  # request id -> status of each answer since the start
        self.counts: Counter[str] = Counter()
        self.surprises: list[str] = []

    @property
    def num_answers(self) -> int:
        """Changes that were acknowledged, and refusals that were to be, since `counts` was emptied."""
        return sum(list(self.counts.values()))

    def run(self, port: int, killing: threading.Event) -> None:
        """Changes without end until the connection breaks, which before `killing` is a surprise."""
        connection = Connection(port)
        try:
            while not self.surprises:
                self._act(connection)
        except (OSError, http.client.HTTPException) as error:
            if not killing.is_set():
                self.surprises.append(f"the connection broke before the kill: {error!r}")
        finally:
            connection.close()

    def settle(self, task: str, expected: ExpectedTask) -> None:
        """What became of the change that was under way."""
        self.tasks[task] = expected
        self.under_way = None

    def _act(self, connection: Connection) -> None:
        chance = self._rng.random()
        if chance < 0.15:
            self._upload_to_shared(connection)
        elif chance < 0.2:
            self._upload_nonsense(connection)
        else:
            self._change(connection, self._next_change())

    def _change(self, connection: Connection, change: Change) -> None:
        self.under_way = change
        answer = self._send(connection, change.method, change.path, change.body)
        if self._noted(answer, change.kind, (200, 201, 204)):
            if change.kind == "upload":
                number = change.after.number_of(digest_of(change.body))
                if answer.json()["version"] != number:
                    self.surprises.append(f"expected version {number}: {answer.body.decode()}")
            self.settle(change.task, change.after)

    def _upload_to_shared(self, connection: Connection) -> None:
        data = self._artifacts.fresh(self._rng)
        digest = digest_of(data)
        with self._shared.lock:
            self._shared.under_way.add(digest)
        answer = self._send(connection, "PUT", f"/admin/v1/tasks/{SHARED}", data)
        if self._noted(answer, "upload to shared", (200, 201)):
            with self._shared.lock:
                self._shared.acknowledged[answer.json()["version"]] = digest
                self._shared.under_way.discard(digest)

    def _upload_nonsense(self, connection: Connection) -> None:
        """Refused, and recorded as such; no task of this name may ever be seen."""
        data = self._artifacts.fresh(self._rng)
        cut = data[: self._rng.randrange(1, len(data))]
        answer = self._send(connection, "PUT", "/admin/v1/tasks/refused", cut)
        self._noted(answer, "refused", (400, 422))

    def _noted(self, answer: Answer, kind: str, expected: tuple[int, ...]) -> bool:
        self.recorded[answer.request_id] = answer.status
        if answer.status not in expected:
            self.surprises.append(f"{kind}: {answer.status} {answer.body.decode()}")
            return False
        self.counts[kind] += 1
        return True

    def _send(self, connection: Connection, method: str, path: str, body: bytes) -> Answer:
        """A long body often goes slowly, so that many a kill finds it half received."""
        if len(body) > _SLOW_PIECE_BYTES and self._rng.random() < 0.3:
            return connection.ask(method, path, self._pieces(body), len(body))
        return connection.ask(method, path, body)

    def _pieces(self, body: bytes) -> Iterator[bytes]:
        for start in range(0, len(body), _SLOW_PIECE_BYTES):
            yield body[start : start + _SLOW_PIECE_BYTES]
            time.sleep(self._rng.random() * 0.005)

    def _next_change(self) -> Change:
        name, task = self._rng.choice(list(self.tasks.items()))
        choices: list[Callable[[str, ExpectedTask], Change]] = [self._upload] * 4
        if task.versions:
            choices.append(self._promotion)
        if len(task.lives) > 1:
            choices += [self._rollback] * 2
        if any(number != task.live for number, _ in task.versions):
            choices.append(self._canary)
        if task.canary is not None:
            choices.append(self._end_of_canary)
        if self._rng.random() < len(task.versions) / 30:
            choices = [self._deletion]
        return self._rng.choice(choices)(name, task)

    def _upload(self, name: str, task: ExpectedTask) -> Change:
        data, activate = self._artifacts.fresh_or_recent(self._rng), self._rng.random() < 0.7
        path = f"/admin/v1/tasks/{name}?activate={str(activate).lower()}"
        after = task.uploaded(digest_of(data), activate=activate)
        return Change(name, "upload", "PUT", path, after, data)

    def _promotion(self, name: str, task: ExpectedTask) -> Change:
        number = self._rng.choice(task.versions)[0]
        body = json.dumps({"version": number}).encode()
        path = f"/admin/v1/tasks/{name}/aliases/live"
        return Change(name, "promote", "PUT", path, task.promoted(number), body)

    def _rollback(self, name: str, task: ExpectedTask) -> Change:
        path = f"/admin/v1/tasks/{name}/rollback"
        return Change(name, "rollback", "POST", path, task.rolled_back())

    def _canary(self, name: str, task: ExpectedTask) -> Change:
        number = self._rng.choice([n for n, _ in task.versions if n != task.live])
        weight = self._rng.choice([0.0, 0.25, 1.0])
        body = json.dumps({"version": number, "weight": weight}).encode()
        path = f"/admin/v1/tasks/{name}/aliases/canary"
        return Change(name, "set canary", "PUT", path, task.on_trial(number, weight), body)

    def _end_of_canary(self, name: str, task: ExpectedTask) -> Change:
        path = f"/admin/v1/tasks/{name}/aliases/canary"
        return Change(name, "end canary", "DELETE", path, task.without_canary())

    def _deletion(self, name: str, task: ExpectedTask) -> Change:
        return Change(name, "delete", "DELETE", f"/admin/v1/tasks/{name}", task.deleted())
