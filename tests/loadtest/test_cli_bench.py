"""A load test of a real server, from the command line: its figures, its report, what it leaves behind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from pydantic import SecretStr

from loadtest.__main__ import main
from loadtest.made_tasks import MadeTasks, random_prefix
from server import bootstrap
from server.config import ServeConfig
from tests.real_app import ADMIN, ADMIN_KEY
from tests.tiny_model_dir import save_tiny_model

API_KEY = "test-api-key"
TASKS = "/admin/v1/tasks"
TRAFFIC = ("--input-len", "2", "6", "--output-len", "2", "4")


@dataclass(frozen=True)
class ThreadedServer:
    """The whole server on a thread of this process, which has what it imports already, behind a real port."""

    url: str

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=120.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadedServer]:
    """With one task that is nobody's business."""
    folder = tmp_path_factory.mktemp("bench")
    config = ServeConfig(
        model=str(save_tiny_model(folder / "model")),
        store=folder / "store",
        num_threads=1,
        num_kv_blocks=200,
        api_key=SecretStr(API_KEY),
        admin_key=SecretStr(ADMIN_KEY),
    )
    settings = uvicorn.Config(bootstrap.build(config).app, log_config=None, lifespan="on")
    running = uvicorn.Server(settings)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not running.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.02)
            found = ThreadedServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
            with found.client() as client:
                base = client.get("/admin/v1/base", headers=ADMIN).json()
                theirs = random_prefix(base, 5, seed=1)
                answer = client.put(f"{TASKS}/theirs", content=theirs, headers=ADMIN)
                assert answer.status_code == 201, answer.text
            yield found
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """The command sets a handler of its own, for the life of its process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def tasks_of(server: ThreadedServer) -> list[str]:
    with server.client() as client:
        return [t["task"] for t in client.get(TASKS, headers=ADMIN).json()["data"]]


def bench(*arguments: str) -> int:
    """Its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_load_test_measures_reports_and_leaves_the_server_as_it_was(
    server: ThreadedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "figures.json"
    flags = ["--make-tasks", "3", "--num-virtual-tokens", "7", "--tasks", "1", "3", "0"]
    flags += ["--rate", "20", "--duration", "1", "--warmup", "0.3", "--slo-ttft", "30"]
    flags += ["--api-key", API_KEY, "--admin-key", ADMIN_KEY]

    code = bench(f"{server.url}/", *flags, *TRAFFIC, "--out", str(out), "--json", str(file))

    captured = capsys.readouterr()
    assert code == 0, captured.err
    figures = json.loads(captured.out.splitlines()[-1])
    assert figures == json.loads(file.read_text()) == json.loads((out / "figures.json").read_text())
    assert [run["tasks"] for run in figures["runs"]] == [0, 1, 3]
    for run in figures["runs"]:
        check_run(run)
    base, _, three = figures["runs"]
    assert set(base["ttft_by_tier"]) == {"no_prefix"}
    assert three["distinct_tasks_asked"] == 3
    assert three["ttft_by_tier"]["resident"]["count"] > 0
    assert "Throughput" in captured.out
    assert "removing tasks: 3 of 3" in captured.err
    assert (out / "report.html").stat().st_size > 10_000
    assert tasks_of(server) == ["theirs"]


def check_run(run: dict[str, Any]) -> None:
    """Everything was answered, and each number fits the others."""
    requests = run["requests"]
    assert requests["done"] == requests["scheduled"] > 5
    assert run["not_done_by_reason"] == {}
    assert run["slo"]["attained"] == 1.0
    assert 0 < run["ttft"]["p50"] <= run["ttft"]["p99"] <= run["e2e"]["max"]
    assert run["itl"]["count"] >= requests["done"], "answers have two tokens or more"
    counters = run["server_counters"]
    found = sum(n for name, n in counters.items() if name.startswith("prefix_cache_lookups"))
    assert found >= (requests["done"] if run["tasks"] else 0)


def test_tasks_that_could_not_be_removed_cost_no_result(
    server: ThreadedServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remove = MadeTasks.remove
    monkeypatch.setattr(MadeTasks, "remove", lambda tasks: [*remove(tasks), "bench-0001"])
    flags = ["--make-tasks", "1", "--num-virtual-tokens", "7", "--duration", "0.5", *TRAFFIC]
    flags += ["--warmup", "0", "--api-key", API_KEY, "--admin-key", ADMIN_KEY]

    assert bench(server.url, *flags) == 1

    captured = capsys.readouterr()
    assert "could not be removed" in captured.err
    assert len(json.loads(captured.out.splitlines()[-1])["runs"]) == 1


def test_tasks_that_are_there_are_used_without_an_admin_key(
    server: ThreadedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXD_URL", server.url)
    monkeypatch.setenv("PREFIXD_API_KEY", API_KEY)

    assert bench("--rate", "20", "--duration", "0.5", "--warmup", "0", *TRAFFIC) == 0

    [run] = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert run["tasks"] == 1
    assert run["requests"]["done"] == run["requests"]["scheduled"] > 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--api-key", "wrong-key"], 1, "another key: --api-key"),
        (["--api-key", API_KEY, "--tasks", "4"], 2, "the server has 1 tasks"),
        (["--api-key", API_KEY, "--make-tasks", "2"], 2, "no admin key"),
        (["--rate", "0"], 2, "--rate 0"),
        (["--no-such-flag"], 2, "no-such-flag"),
    ],
)
def test_what_can_not_be_measured_is_an_error_with_an_exit_code(
    server: ThreadedServer,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    said: str,
) -> None:
    assert bench(server.url, *flags) == code

    captured = capsys.readouterr()
    assert said in " ".join((captured.err + captured.out).split())
    assert "Traceback" not in captured.err


def test_an_interrupt_ends_it_and_removes_what_it_made(
    server: ThreadedServer, tmp_path: Path
) -> None:
    flags = ["--make-tasks", "3", "--num-virtual-tokens", "7", "--duration", "120", *TRAFFIC]
    flags += ["--api-key", API_KEY, "--admin-key", ADMIN_KEY]
    command = [sys.executable, "-m", "loadtest", "bench", server.url, *flags]
    with (tmp_path / "err").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        deadline = time.monotonic() + 120
        while "sent" not in (tmp_path / "err").read_text():
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(tasks_of(server)) == 4
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)

    assert process.returncode == 130
    assert json.loads(output.splitlines()[-1])["interrupted"] is True
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert tasks_of(server) == ["theirs"]
