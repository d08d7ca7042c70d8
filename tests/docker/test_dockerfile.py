"""The Dockerfile, read instruction by instruction: what can be known of the images without building them."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from server import __version__
from server.config import ServeConfig

ROOT = Path(__file__).parents[2]
TARGETS = ("cpu", "cuda")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


class Instruction(NamedTuple):
    stage: str
    keyword: str
    value: str


def instructions() -> list[Instruction]:
    """Every instruction, its continuation lines joined, with the name of the stage it is in."""
    lines = [
        line
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    found, stage = [], ""
    for statement in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        keyword, value = statement.split(maxsplit=1)
        if keyword == "FROM":
            stage = value.split(" AS ")[1]
        found.append(Instruction(stage, keyword, value))
    return found


def image(target: str) -> list[Instruction]:
    """What applies to a target: its own instructions after those of the stages it is built on."""
    own = [item for item in instructions() if item.stage == target]
    base = own[0].value.split()[0]
    return ([] if base.startswith("$") else image(base)) + own


def last(target: str, keyword: str) -> str:
    return [item.value for item in image(target) if item.keyword == keyword][-1]


def copies() -> Iterator[tuple[str, str]]:
    """Each (stage or "", source) of a COPY."""
    for item in instructions():
        if item.keyword == "COPY":
            *words, _ = item.value.split()
            origin = words.pop(0).removeprefix("--from=") if words[0].startswith("--") else ""
            yield from ((origin, source) for source in words)


def environment(target: str) -> dict[str, str]:
    settings = [item.value for item in image(target) if item.keyword == "ENV"]
    return dict(pair.split("=", 1) for value in settings for pair in value.split())


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_numbered_user_other_than_root(target: str) -> None:
    # A number: Kubernetes' runAsNonRoot can not judge a name.
    assert last(target, "USER") == "10001:10001"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_starts_the_projects_command_without_a_shell(target: str) -> None:
    # A shell in between would keep SIGTERM from the server.
    assert json.loads(last(target, "ENTRYPOINT")) == ["prefixd"]
    assert "prefixd" in PYPROJECT["project"]["scripts"]
    assert json.loads(last(target, "CMD")) == ["serve"]
    assert last(target, "STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("target", TARGETS)
def test_what_an_image_writes_is_a_volume(target: str) -> None:
    variables = environment(target)
    written = {variables["HF_HOME"], variables["PREFIXD_STORE"]}
    assert set(json.loads(last(target, "VOLUME"))) == written


@pytest.mark.parametrize("target", TARGETS)
def test_an_images_settings_exist(target: str) -> None:
    names = [name for name in environment(target) if name.startswith("PREFIXD_")]
    assert {n.removeprefix("PREFIXD_").lower() for n in names} <= ServeConfig.model_fields.keys()
    assert int(last(target, "EXPOSE")) == ServeConfig.model_fields["port"].default


def test_only_the_cuda_image_has_a_compiler() -> None:
    def installs(target: str) -> bool:
        return any("gcc" in item.value for item in image(target) if item.keyword == "RUN")

    assert installs("cuda")  # so that the next line tests something
    assert not installs("cpu")


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    stages = {item.stage for item in instructions()}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    for stage, source in copies():
        if stage:
            assert stage in stages
        else:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignore


def test_the_wheel_is_built_from_every_package_and_file_that_pyproject_names() -> None:
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    project = PYPROJECT["project"]
    needed = {*wheel, project["readme"], *project["license-files"], "pyproject.toml"}
    assert needed <= {source for stage, source in copies() if not stage}


def test_the_image_is_labelled_with_the_projects_version() -> None:
    assert ("runtime", "ARG", f"VERSION={__version__}") in instructions()


def test_makefile_and_dockerfile_install_the_same_torch() -> None:
    pinned = re.search(r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    arguments = [item.value for item in instructions() if item.keyword == "ARG"]
    assert arguments.count(f"TORCH={pinned[1]}") == len(TARGETS)


@contextmanager
def listening(status: int) -> Iterator[int]:
    """A server that answers /healthz with `status`; gives its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class says so
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def health_check(port: int) -> int:
    """The exit status of the image's HEALTHCHECK command."""
    command = json.loads(last("cpu", "HEALTHCHECK").partition("CMD ")[2])
    assert command[0] == "python"
    # A proxy that is not there: a container's proxy settings must not get between it and itself.
    variables = {"PREFIXD_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, *command[1:]], env=variables, capture_output=True, timeout=30
    )
    return done.returncode


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_has_a_health_check_that_waits_for_a_model_to_load(target: str) -> None:
    assert "--start-period=300s" in last(target, "HEALTHCHECK")


def test_the_health_check_passes_when_the_server_is_healthy() -> None:
    with listening(200) as port:
        assert health_check(port) == 0


def test_the_health_check_fails_when_the_server_says_503() -> None:
    with listening(503) as port:
        assert health_check(port) != 0


def test_the_health_check_fails_when_nobody_listens() -> None:
    with listening(200) as port:
        pass
    assert health_check(port) != 0
