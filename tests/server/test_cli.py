"""The command line: what it prints, how it refuses, and that it starts without the heavy libraries."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from server import __version__
from server.cli import main
from server.log import JsonFormatter
from tests.prefix_store.builders import make_artifact
from tests.server.http.fakes import ADMIN_KEY, FakeEngine, make_app

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the console script in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return code, out, err

    monkeypatch.setenv("COLUMNS", "200")
    return call


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The app with a fake engine, in the place of the network."""
    client = TestClient(make_app(FakeEngine()))

    def request(method: str, url: str, *, timeout: float, **arguments: Any) -> httpx2.Response:
        return client.request(method, url, **arguments)

    monkeypatch.setattr(httpx2, "request", request)
    monkeypatch.setenv("PREFIXD_URL", "http://testserver/")
    monkeypatch.setenv("PREFIXD_ADMIN_KEY", ADMIN_KEY)


def test_importing_the_command_line_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'starlette', 'uvicorn', 'httpx2', 'numpy'}"
    code = f"import server.cli, sys; print(sorted({heavy} & sys.modules.keys()))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_help_lists_the_commands_and_serve_lists_the_settings(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(word in out for word in ("serve", "generate", "tasks", "config", "version"))

    code, out, _ = run("serve", "--help")
    assert code == 0
    assert all(word in out for word in ("--max-num-seqs", "--admin-key", "Engine and memory"))


def test_the_version_is_printed(run: Run) -> None:
    assert run("version") == (0, f"prefixd {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--prot", "1"), "Did you mean --port?"),
        (("serv",), "Did you mean"),
        (("serve", "--port", "70000"), "--port / PREFIXD_PORT"),
        (("serve", "--dtype", "int8"), "'bfloat16'"),
        (("serve", "--host", "0.0.0.0"), "--insecure"),
        (("serve", "--config", "/nowhere.toml"), "No such file"),
        (("tasks", "show"), "task"),
    ],
)
def test_a_wrong_call_is_a_box_and_exit_code_2(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(*arguments)

    assert code == 2
    assert message in out + err
    assert "╭" in out + err
    assert "Traceback" not in out + err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run("serve", "--port", taken.getsockname()[1], "--model", "/nowhere")

    assert code == 2
    assert "in use" in err


def test_the_configuration_is_shown_with_origins_and_without_secrets(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXD_PORT", "9000")

    code, out, _ = run(
        "config", "show", "--api-key", "a-long-enough-key", "--pin", "a", "--pin", "b"
    )

    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert lines["port"].split() == ["port", "9000", "variable", "PREFIXD_PORT"]
    assert lines["pin"].split(maxsplit=1)[1].startswith("a, b")
    assert lines["host"].endswith("default")
    assert "a-long-enough-key" not in out


def test_a_task_is_pushed_listed_shown_and_removed(run: Run, server: None, tmp_path: Path) -> None:
    file = tmp_path / "fresh.safetensors"
    file.write_bytes(make_artifact(seed=9, base_model={}))

    code, out, _ = run("tasks", "push", file)
    assert code == 0
    assert out.startswith("fresh@v1  sha256:")
    assert "warning: unverified base" in out
    assert "unchanged" in run("tasks", "push", file, "--task", "fresh")[1]

    _, out, _ = run("tasks", "list")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["clerk", "fresh", "poet"]
    _, out, _ = run("tasks", "show", "poet")
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["v2", "v1"]

    assert run("tasks", "rm", "fresh")[1] == "fresh removed\n"
    assert "fresh" not in run("tasks", "list")[1]


def test_a_refused_artifact_is_told_fault_by_fault(run: Run, server: None, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(make_artifact(num_virtual_tokens=17))

    code, _, err = run("tasks", "push", file)

    assert code == 1
    assert "422: the artifact was refused" in err
    assert "/manifest/num_virtual_tokens" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tasks", "rm", "nobody"), "404: there is no task 'nobody'"),
        (("tasks", "list", "--admin-key", "wrong"), "401: the key does not open"),
        (("tasks", "push", "/nowhere/x"), "No such file"),
    ],
)
def test_a_command_that_fails_is_a_box_and_exit_code_1(
    run: Run, server: None, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = run(*arguments)

    assert code == 1
    assert message in err


def test_without_a_key_or_a_server_the_command_says_which(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "PREFIXD_ADMIN_KEY" in run("tasks", "list")[2]

    monkeypatch.setenv("PREFIXD_ADMIN_KEY", ADMIN_KEY)
    code, _, err = run("tasks", "list", "--url", "http://127.0.0.1:9")
    assert code == 1
    assert "is the server running?" in err


def test_an_answer_that_is_no_problem_json_is_shown_as_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXD_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setattr(httpx2, "request", lambda *_, **__: httpx2.Response(502, text="<html>bad"))

    assert "the server answered 502: <html>bad" in run("tasks", "list")[2]


def test_a_json_log_line_has_only_chosen_fields() -> None:
    record = logging.LogRecord("x", logging.INFO, "f.py", 1, "hello %s", ("you",), None)
    record.request_id = "abc"
    record.prompt = "private"

    line = json.loads(JsonFormatter().format(record))

    assert line.keys() == {"time", "level", "logger", "message", "request_id"}
    assert (line["message"], line["request_id"]) == ("hello you", "abc")
