"""The README's commands do what it says: its shell and Python blocks run against the demo server.

`console` blocks start servers and are not run here; `make demo` and `make test` run in CI itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live_server import LiveServer, live_server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ADMIN_KEY = "choose-a-long-one"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("readme")
    with live_server(folder, "--store", str(folder / "store"), "--admin-key", ADMIN_KEY) as running:
        yield running


def run(command: list[str], text: str, server: LiveServer) -> str:
    """Runs `text` in the repository as the README has it, but for the port."""
    done = subprocess.run(
        [*command, text.replace("http://127.0.0.1:8000", server.url)],
        cwd=ROOT,
        env={**os.environ, "PREFIXD_URL": server.url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error"' not in done.stdout, done.stdout
    assert '"status":4' not in done.stdout, done.stdout
    return done.stdout


def test_the_first_commands_of_the_readme_give_the_sentence_that_it_promises(
    server: LiveServer,
) -> None:
    shell = blocks("bash")

    first = run(["bash", "-euc"], shell[0], server)
    plain = run(["bash", "-euc"], shell[1], server)

    assert "Giakfusda is a tavern in the city centre area" in first
    assert "Giakfusda is a tavern in the city centre area" in plain


def test_the_openai_snippet_runs(server: LiveServer) -> None:
    (snippet,) = blocks("python")

    assert "Giakfusda is a tavern" in run([sys.executable, "-c"], snippet, server)


def test_the_upload_walk_through_runs_and_leaves_nothing(server: LiveServer) -> None:
    script = blocks("bash")[2].replace(".venv/bin/prefixd", f"{sys.executable} -m server")

    output = run(["bash", "-euc"], script, server)

    assert "negative" in output
    with server.client() as client:
        answer = client.get(
            "/admin/v1/tasks/my-task", headers={"Authorization": f"Bearer {ADMIN_KEY}"}
        )
        assert answer.status_code == 404


def test_the_training_walk_through_runs_and_serves_what_it_trained(
    server: LiveServer, tmp_path: Path
) -> None:
    script = blocks("bash")[3].replace("/tmp/", f"{tmp_path}/")
    script = script.replace(".venv/bin/python", sys.executable)
    script = script.replace(".venv/bin/prefixd", f"{sys.executable} -m server")
    assert "2000" in script
    assert "--num-steps 400" in script
    short = script.replace("2000", "60").replace("--num-steps 400", "--num-steps 12")

    output = run(["bash", "-euc"], short, server)

    assert "best held-out loss" in output
    assert '"text"' in output


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
