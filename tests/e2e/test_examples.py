"""The walk-throughs in examples/ do what they say: their shell blocks run against a server, with fewer steps and rows.

`console` blocks start servers and are not run here.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live_server import LiveServer, live_server

ROOT = Path(__file__).parents[2]
WALK = ROOT / "examples" / "csv-to-served-task"
README = (WALK / "README.md").read_text()
ADMIN_KEY = "choose-a-long-one"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("walk")
    with live_server(folder, "--store", str(folder / "store"), "--admin-key", ADMIN_KEY) as running:
        yield running


def rows(name: str) -> list[list[str]]:
    with (WALK / name).open(newline="") as file:
        header, *found = csv.reader(file)
    assert header == ["text", "record"]
    return found


def shortened(script: str, name: str, count: int, directory: Path) -> str:
    """The script with a table of the first rows in the place of the whole one."""
    whole = f"examples/csv-to-served-task/{name}"
    assert whole in script
    with (directory / name).open("w", newline="") as file:
        csv.writer(file).writerows([["text", "record"], *rows(name)[:count]])
    return script.replace(whole, str(directory / name))


@pytest.mark.slow
def test_the_walk_through_from_a_csv_to_a_served_task_runs(
    server: LiveServer, tmp_path: Path
) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    script = shortened("\n".join(blocks), "sentences.csv", 60, tmp_path)
    script = shortened(script, "unseen.csv", 4, tmp_path)
    script = script.replace("/tmp/csv-walk", str(tmp_path / "walk"))
    script = script.replace(".venv/bin/prefixd", f"{sys.executable} -m server")
    script = script.replace("http://127.0.0.1:8000", server.url)
    assert script.count("--num-steps 200") == 1

    done = subprocess.run(
        ["bash", "-euc", script.replace("--num-steps 200", "--num-steps 20")],
        cwd=ROOT,
        env={**os.environ, "PREFIXD_URL": server.url, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    for told in ("best held-out loss", "probe:      reproduced", "exact_match", "records@v1"):
        assert told in done.stdout, done.stdout
    # Twenty steps teach the form; the values take the two hundred that the text has.
    assert '"text":" area = ' in done.stdout, done.stdout
    assert (tmp_path / "walk" / "run" / "report.html").is_file()


def test_its_tables_share_no_row_and_no_name() -> None:
    learned, unseen = rows("sentences.csv"), rows("unseen.csv")
    assert (len(learned), len(unseen)) == (600, 100)

    def names(of: list[list[str]]) -> set[str]:
        return {match for _, record in of for match in re.findall(r"name = (\w+)", record)}

    assert len(names(unseen)) > 80
    assert not names(learned) & names(unseen)


def test_every_file_that_it_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", README):
        assert (WALK / target).exists(), target
