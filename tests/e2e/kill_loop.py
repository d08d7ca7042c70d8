"""Kills the real server with SIGKILL while clients change its tasks, and looks for what it acknowledged.

    python -m tests.e2e.kill_loop --cycles 2000        (make kill-loop)

One cycle: start the server on the store that the last kill left; check over HTTP that each task is as its clients know
it, a change that was under way done wholly or not at all, and that each visible version downloads to its digest; check
the audit log against the answers; then load, and SIGKILL at a random moment. Now and then the server is also killed
while it starts. A kill keeps the page cache, so this can not show a missing fsync: `tests.prefix_store.crash` does.
Progress on stderr, one JSON line on stdout; exit code 1 if anything was lost, altered or invalid.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prefix_store import audit_log
from prefix_store.spec import digest_of
from tests.e2e.expected_tasks import ExpectedTask, View
from tests.e2e.kill_clients import SHARED, Artifacts, Client, Connection, SharedTask
from tests.e2e.live_server import START_SECONDS, free_port
from tests.e2e.warm_server import WarmServer
from tests.tiny_model_dir import save_tiny_model

NUM_CLIENTS: Final = 4
CYCLES_PER_STORE: Final = 100  # then a new directory: a start replays every record that ever was
# A kill comes behind so many acknowledged changes (on a busy machine too), and then up to so long.
MOST_CHANGES: Final = 24
LONGEST_WAIT_SECONDS: Final = 0.012
_MOST_SHARED_VERSIONS: Final = 12


@dataclass
class Result:
    """`lost`, `altered`, `invalid`: what was found wrong, in words; the other numbers say how much was looked at."""

    cycles: int = 0
    kills_during_start: int = 0
    acknowledged: int = 0
    under_way_done: int = 0
    under_way_not_done: int = 0
    versions_read: int = 0
    generations: int = 0
    audit_records: int = 0
    lost: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return not (self.lost or self.altered or self.invalid)

    def line(self) -> str:
        """The closing line: one JSON object."""
        numbers = dict(vars(self))
        for name in ("lost", "altered", "invalid"):
            numbers[name] = len(numbers[name])
        return json.dumps(numbers | {"seconds": round(self.seconds, 1)})


class StoreUnderKills:
    """One store directory, its clients, and what they know of it."""

    def __init__(
        self, server: WarmServer, model: Path, store: Path, rng: random.Random, result: Result
    ) -> None:
        self._server = server
        self._store = store
        self._rng = rng
        self._result = result
        self._shared = SharedTask()
        artifacts = Artifacts()
        self._clients = [
            Client(f"client{number}", rng.getrandbits(32), artifacts, self._shared)
            for number in range(NUM_CLIENTS)
        ]
        self._port = free_port()
        self._arguments = [
            "serve", "--model", str(model), "--store", str(store), "--port", str(self._port),
            "--num-kv-blocks", "64", "--device", "cpu",
        ]  # fmt: skip

    def cycle(self, *, thorough: bool) -> None:
        """Start, check, load, kill."""
        if self._rng.random() < 0.1:
            self._server.start(*self._arguments)
            time.sleep(self._rng.random() * 0.3)
            self._server.kill()
            self._result.kills_during_start += 1
        self._start()
        connection = Connection(self._port)
        self._check(connection, thorough=thorough)
        if len(self._shared.acknowledged) > _MOST_SHARED_VERSIONS:
            assert connection.ask("DELETE", f"/admin/v1/tasks/{SHARED}").status == 204
            self._shared.acknowledged.clear()
        connection.close()
        if self._result.ok:
            self._load_and_kill()
        else:
            self._server.kill()

    def check(self) -> None:
        """After the last cycle."""
        self._start()
        connection = Connection(self._port)
        self._check(connection, thorough=True)
        connection.close()
        self._server.kill()

    # ---- load ----------------------------------------------------------------------------------

    def _start(self) -> None:
        self._server.start(*self._arguments)
        deadline = time.monotonic() + START_SECONDS
        while True:
            connection = Connection(self._port)
            try:
                if connection.ask("GET", "/readyz").status == 200:
                    return
            except OSError:
                time.sleep(0.005)
            finally:
                connection.close()
            assert time.monotonic() < deadline, f"not ready:\n{self._server.output()}"

    def _load_and_kill(self) -> None:
        killing = threading.Event()
        threads = [
            threading.Thread(target=client.run, args=(self._port, killing))
            for client in self._clients
        ]
        for thread in threads:
            thread.start()
        self._wait_for_load(self._rng.randrange(MOST_CHANGES))
        time.sleep(self._rng.random() * LONGEST_WAIT_SECONDS)
        killing.set()
        self._server.kill()
        for thread in threads:
            thread.join(60)
        for client in self._clients:
            self._result.invalid += client.surprises
            self._result.kinds += client.counts
            self._result.acknowledged += client.counts.total()
            client.counts.clear()
        self._result.cycles += 1

    def _wait_for_load(self, num_changes: int) -> None:
        deadline = time.monotonic() + 10
        while sum(client.num_answers for client in self._clients) < num_changes:
            if any(client.surprises for client in self._clients) or time.monotonic() > deadline:
                return
            time.sleep(0.001)

    # ---- checks --------------------------------------------------------------------------------

    def _check(self, connection: Connection, *, thorough: bool) -> None:
        names = self._names(connection)
        views = {name: self._view(connection, name) for name in names}
        known = {name for client in self._clients for name in client.tasks} | {SHARED}
        self._result.invalid += [f"a task that nobody made: {name}" for name in names - known]
        for client in self._clients:
            for name, expected in client.tasks.items():
                self._check_task(client, name, expected, views.get(name))
        self._check_shared(views.get(SHARED))
        self._check_contents(connection, views)
        self._check_audit()
        if thorough:
            self._generate(connection, views)
            self._run_audit_verify()

    def _names(self, connection: Connection) -> set[str]:
        answer = connection.ask("GET", "/admin/v1/tasks?limit=1000")
        return {task["task"] for task in answer.json()["data"]}

    def _view(self, connection: Connection, name: str) -> View:
        answer = connection.ask("GET", f"/admin/v1/tasks/{name}")
        assert answer.status == 200, answer.body
        return View.of(answer.json())

    def _check_task(
        self, client: Client, name: str, expected: ExpectedTask, seen: View | None
    ) -> None:
        change = client.under_way
        under_way = change.after if change is not None and change.task == name else None
        if under_way is not None and seen == under_way.view:
            self._result.under_way_done += under_way.view != expected.view
            client.settle(name, under_way)
            return
        if under_way is not None:
            self._result.under_way_not_done += 1
            client.settle(name, expected)
        if seen == expected.view:
            return
        text = f"{name}: expected {expected.view}, or {under_way and under_way.view}; got {seen}"
        before, now = dict(expected.versions), dict(seen.versions) if seen else {}
        if any(now.get(number, digest) != digest for number, digest in before.items()):
            self._result.altered.append(text)
        elif now.keys() - before.keys():
            self._result.invalid.append(text)
        else:
            self._result.lost.append(text)

    def _check_shared(self, seen: View | None) -> None:
        shared = self._shared
        now = dict(seen.versions) if seen else {}
        for number, digest in shared.acknowledged.items():
            if number not in now:
                self._result.lost.append(f"{SHARED}: version {number}")
            elif now[number] != digest:
                self._result.altered.append(f"{SHARED}: version {number} is {now[number]}")
        others = {number: now[number] for number in now.keys() - shared.acknowledged.keys()}
        stray = [number for number, digest in others.items() if digest not in shared.under_way]
        first = shared.num_versions + 1 if not shared.acknowledged else min(shared.acknowledged)
        last = max(now, default=shared.num_versions)
        if stray or (now and sorted(now) != list(range(min(first, *now), last + 1))):
            self._result.invalid.append(f"{SHARED}: {now}, acknowledged {shared.acknowledged}")
        if seen is not None and seen.live != last:
            self._result.invalid.append(f"{SHARED}: version {last} is not live, but {seen.live}")
        self._result.under_way_done += len(others)
        self._result.under_way_not_done += len(shared.under_way) - len(others)
        shared.acknowledged, shared.num_versions = now, last
        shared.under_way.clear()

    def _check_contents(self, connection: Connection, views: dict[str, View]) -> None:
        """Whatever is visible can be read, and nothing else lies in the store."""
        visible = {d: (name, n) for name, view in views.items() for n, d in view.versions}
        for digest, (name, number) in visible.items():
            answer = connection.ask("GET", f"/admin/v1/tasks/{name}/versions/{number}/content")
            if answer.status != 200:
                self._result.lost.append(f"{name}@v{number}: {answer.status} {answer.body!r}")
            elif digest_of(answer.body) != digest:
                self._result.altered.append(f"{name}@v{number}: its bytes are not {digest}")
            self._result.versions_read += 1
        blobs = {f"sha256:{path.name}" for path in (self._store / "blobs").glob("*/*")}
        leftovers = [path.name for path in (self._store / "tmp").iterdir()]
        if blobs - visible.keys() or leftovers:
            self._result.invalid.append(
                f"blobs that no version names {blobs - visible.keys()}, in tmp {leftovers}"
            )

    def _check_audit(self) -> None:
        """The chain holds, and each answer that a client got is in it once, with its status."""
        report = audit_log.verify(self._store / "audit")
        if not report.ok:
            self._result.invalid.append(f"audit log: {report}")
        lines = [
            json.loads(line)
            for path in sorted((self._store / "audit").iterdir())
            for line in path.read_bytes().splitlines()
        ]
        statuses = {line["request_id"]: line.get("status") for line in lines}
        if len(statuses) != len(lines):
            self._result.invalid.append("audit log: a request is recorded twice")
        for client in self._clients:
            for request_id, status in client.recorded.items():
                if statuses.get(request_id) != status:
                    self._result.lost.append(f"audit log: no record of {request_id} ({status})")
            self._result.audit_records += len(client.recorded)
            client.recorded.clear()

    def _generate(self, connection: Connection, views: dict[str, View]) -> None:
        for name, view in views.items():
            if view.live is None:
                continue
            body = {"task": name, "prompt": "the quick", "max_tokens": 4, "user": "one"}
            answer = connection.ask("POST", "/generate", json.dumps(body).encode())
            allowed = {view.live, view.canary and view.canary[0]}
            if answer.status != 200 or answer.json()["version"] not in allowed:
                self._result.invalid.append(f"{name} generates: {answer.status} {answer.body!r}")
            self._result.generations += 1

    def _run_audit_verify(self) -> None:
        command = [sys.executable, "-m", "server", "audit", "verify", str(self._store)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self._result.invalid.append(f"prefixd audit verify: {done.stdout}{done.stderr}")


def run(directory: Path, cycles: int, seed: int = 0, planted_bug: str | None = None) -> Result:
    """`cycles` cycles in `directory`, which is empty; ends early when something is found."""
    rng = random.Random(seed)
    result = Result()
    started = time.monotonic()
    model = save_tiny_model(directory / "model")
    with WarmServer(model, directory / "server.log", planted_bug) as server:
        for first in range(0, cycles, CYCLES_PER_STORE):
            store = directory / f"store-{first}"
            under_kills = StoreUnderKills(server, model, store, rng, result)
            for number in range(first, min(first + CYCLES_PER_STORE, cycles)):
                under_kills.cycle(thorough=number % 50 == 20)
                if not result.ok:
                    break
                if number % 50 == 49:
                    show_progress(result, cycles, time.monotonic() - started)
            else:
                under_kills.check()
            if not result.ok:
                break
            shutil.rmtree(store)
    result.seconds = time.monotonic() - started
    return result


def show_progress(result: Result, cycles: int, seconds: float) -> None:
    done = f"{result.cycles}/{cycles} cycles, {result.acknowledged} changes acknowledged"
    print(f"{done}, {seconds / result.cycles:.2f} s/cycle", file=sys.stderr, flush=True)


def complaints(result: Result) -> Iterable[str]:
    for kind in ("lost", "altered", "invalid"):
        found: list[Any] = getattr(result, kind)
        yield from (f"{kind}: {text}" for text in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="on the file system to use; made if missing")
    arguments = parser.parse_args()
    if arguments.directory is not None:
        arguments.directory.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="kill-loop-", dir=arguments.directory))
    result = run(directory, arguments.cycles, arguments.seed)
    print(result.line(), flush=True)
    if result.ok:
        shutil.rmtree(directory)
        return 0
    print(*complaints(result), f"left for study: {directory}", sep="\n", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
