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

from prefix_store.audit_log import AuditLog
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

    def stream(method: str, url: str, *, timeout: float, **arguments: Any) -> Any:
        return client.stream(method, url, **arguments)

    monkeypatch.setattr(httpx2, "request", request)
    monkeypatch.setattr(httpx2, "stream", stream)
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
    assert all(word in out for word in ("serve", "generate", "tasks", "train", "config", "version"))

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
    assert "warning:    unverified base" in out
    assert "unchanged" in run("tasks", "push", file, "--task", "fresh")[1]

    _, out, _ = run("tasks", "list")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["clerk", "fresh", "poet"]
    _, out, _ = run("tasks", "show", "poet")
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["v2", "v1"]

    assert run("tasks", "rm", "fresh")[1] == "fresh removed\n"
    assert "fresh" not in run("tasks", "list")[1]


def test_a_push_can_be_dry_and_says_what_a_peft_file_is(
    run: Run, server: None, tmp_path: Path
) -> None:
    file = tmp_path / "fresh.safetensors"
    file.write_bytes(make_artifact(seed=9))

    code, out, _ = run("tasks", "push", file, "--dry-run")
    assert code == 0
    assert out.splitlines()[0].endswith("nothing was stored")
    assert "\nrecognised: native artifact" in out
    assert "fresh" not in run("tasks", "list")[1]

    code, _, err = run("tasks", "push", file, "--peft-type", "CPT", "--task-index", "3")
    assert code == 1
    assert "peft_type: the file holds no PEFT prompt" in err


def test_versions_are_promoted_rolled_back_and_tried(
    run: Run, server: None, tmp_path: Path
) -> None:
    file = tmp_path / "poet.safetensors"
    file.write_bytes(make_artifact(seed=9))

    def live() -> str:
        return next(line.split()[1] for line in shown() if line.endswith("live"))

    def shown() -> list[str]:
        return run("tasks", "show", "poet")[1].splitlines()

    assert run("tasks", "push", file, "--no-activate")[1].splitlines()[0].endswith("stored")
    assert live() == "v2"
    assert run("tasks", "promote", "poet", "v3")[1].strip().endswith("live")
    assert "live already" in run("tasks", "promote", "poet", "3")[1]
    assert live() == "v3"
    assert run("tasks", "rollback", "poet")[1].startswith("poet@v2 ")
    assert "live again" in run("tasks", "push", file)[1]
    assert run("tasks", "canary", "poet", "1", "--weight", "0.1")[1].strip().endswith("10.0%")
    assert shown()[-1].endswith("canary")
    assert "live, canary v1 10%" in run("tasks", "list")[1]
    assert run("tasks", "canary", "poet", "--end")[1] == "poet has no canary\n"


def test_a_task_is_pinned_warmed_and_evicted(run: Run, server: None) -> None:
    out = run("tasks", "pin", "poet", "--ttl", "60")[1]
    assert "pinned for 60 s; 1 of 10 blocks of the pin budget" in out
    assert "until it is unpinned" in run("tasks", "pin", "poet")[1]
    assert run("tasks", "unpin", "poet")[1] == "poet unpinned\n"
    assert "on its way" in run("tasks", "warm", "poet", "v1")[1]
    assert run("tasks", "evict", "poet")[1] == "poet evicted, 2 versions\n"


def test_what_was_pushed_is_pulled_and_verified(
    run: Run, server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fresh.safetensors").write_bytes(make_artifact(seed=9))
    run("tasks", "push", "fresh.safetensors")

    code, out, _ = run("tasks", "pull", "fresh")
    assert (code, out.split()[0]) == (0, "fresh-v1.safetensors")
    assert run("tasks", "pull", "poet@v1", "--output", "old")[0] == 0
    assert (tmp_path / "fresh-v1.safetensors").read_bytes() == make_artifact(seed=9)
    assert (tmp_path / "old").read_bytes() == make_artifact(seed=1)
    assert not list(tmp_path.glob("*.part"))


def test_a_download_that_is_not_what_was_announced_gets_no_name(
    run: Run, server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.cli_transfer._save", lambda *_: "sha256:other")
    code, _, err = run("tasks", "pull", "poet", "--output", tmp_path / "out")
    assert code == 1
    assert "received sha256:other" in err
    assert list(tmp_path.iterdir()) == []


def test_a_transfer_shows_its_progress_on_a_terminal_only(
    run: Run, server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    file = tmp_path / "fresh.safetensors"
    file.write_bytes(make_artifact(seed=9))
    assert "push" not in run("tasks", "push", file)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "push fresh.safetensors" in run("tasks", "push", file)[1]


def test_the_audit_log_is_verified(run: Run, tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    for _ in range(3):
        log.append(who="key", action="upload")
    log.close()
    for place in (tmp_path, tmp_path / "audit"):
        assert run("audit", "verify", place) == (0, f"3 records, head {log.head}\n", "")
    assert run("audit", "verify", tmp_path, "--head", log.head)[0] == 0
    code, _, err = run("audit", "verify", tmp_path, "--head", "0" * 63 + "1")
    assert (code, "its end was cut off" in err) == (1, True)

    [file] = (tmp_path / "audit").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    code, _, err = run("audit", "verify", tmp_path)
    assert (code, "the last line is torn" in err, "2 records" in err) == (1, True, True)
    file.write_bytes(whole.replace(b"upload", b"delete", 1))
    code, _, err = run("audit", "verify", tmp_path)
    assert (code, "record 1: it is not what its hash says" in err) == (1, True)
    assert "there is no such folder" in run("audit", "verify", tmp_path / "nowhere")[2]


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
        (("tasks", "list", "--admin-key", "wrong"), "401: the key is not one"),
        (("tasks", "push", "/nowhere/x"), "No such file"),
        (("tasks", "promote", "poet", "v9"), "404: task 'poet' has no version 'v9'"),
        (("tasks", "promote", "poet", "latest"), "expected a number, as 3 or v3"),
        (("tasks", "canary", "poet"), "or pass --end"),
        (("tasks", "canary", "poet", "2"), "409: version 2 of task 'poet' is live"),
        (("tasks", "pull", "poet@v9"), "404"),
        (("tasks", "pull", "poet", "--output", "/nowhere/x"), "No such file"),
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
